"""True compression in memory: packed codes instead of weights, unpacked when a layer is called."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.quantizer import Mode, WeightQuantizer
from octavo.nn.snapshot import weight_key
from octavo.numerics.packing import pack, unpack
from octavo.numerics.qtensor import QTensor
from octavo.spec.element import IntFormat

_LEVELS = ("scale", "offset")


class PackedTensor(nn.Module):
    """A QTensor as buffers: packed ``codes``, and its scales, which are packed in turn where they are quantized."""

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.format = tensor.format
        self.shape = tensor.shape
        self.code_shape = tuple(tensor.codes.shape)
        bits = tensor.format.element.bits
        self.is_packed = bits <= 8
        self.register_buffer("codes", pack(tensor.codes, bits) if self.is_packed else tensor.codes)
        self.register_buffer("zero_point", tensor.zero_point)
        for level in _LEVELS:
            part = tensor.scale if level == "scale" else tensor.offset
            if isinstance(part, QTensor):
                self.add_module(level, PackedTensor(part))
            else:
                self.register_buffer(level, part)

    def tensor(self) -> QTensor:
        """The QTensor that was packed."""
        element = self.format.element
        codes: Tensor = self.codes
        if self.is_packed:
            signed = isinstance(element, IntFormat) and element.is_signed
            codes = unpack(codes, element.bits, self.code_shape[-1], signed=signed)
        scale, offset = (self._level(level) for level in _LEVELS)
        return QTensor(codes, scale, self.format, self.shape, self.zero_point, offset)

    def _level(self, level: str) -> Tensor | QTensor | None:
        part = self._modules.get(level)
        return part.tensor() if isinstance(part, PackedTensor) else self._buffers.get(level)


class PackedWeight(nn.Module):
    """Codes of one parameter and how to make it of them."""

    def __init__(self, quantizer: WeightQuantizer, parameter: nn.Parameter) -> None:
        super().__init__()
        self.view = quantizer.view
        self.spec = quantizer.spec
        self.packed = PackedTensor(quantizer.codes(parameter))
        self.register_buffer("like", torch.empty(0, dtype=parameter.dtype, device=parameter.device))

    def forward(self) -> Tensor:
        """The rounded weight, in the parameter's shape and in the dtype that the model has now."""
        return self.view.to_parameter(self.packed.tensor().dequantize(self.like.dtype))

    def _apply(self, fn: object, recurse: bool = True) -> PackedWeight:
        """Scales keep their dtype when the model is cast; only ``like`` follows."""
        before = dict(self.packed.named_buffers())
        super()._apply(fn, recurse)
        for name, kept in before.items():
            holder, _, leaf = name.rpartition(".")
            owner = self.packed.get_submodule(holder)
            after = owner._buffers[leaf]
            if after is not None and after.dtype != kept.dtype:
                owner._buffers[leaf] = kept.to(after.device)
        return self


def _unpacking(name: str) -> property:
    return property(lambda self: self._modules[f"packed_{name}"]())


@cache
def _lowered_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """``cls`` whose parameters ``names`` are unpacked whenever they are read."""
    body = {name: _unpacking(name) for name in names}
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__, "octavo_lowered": True})


@torch.no_grad()
def lower(model: nn.Module) -> nn.Module:
    """Replace every quantized weight by its packed codes, in place; outputs stay those of the simulation.

    Activation quantizers stay. The full-precision weights are gone: ``strip`` is no longer possible.

    Raises:
        UserError: nothing is quantized, a weight has no range yet, or a quantized weight is trained on.
    """
    holders = [
        (path, holder, name, child)
        for path, holder in model.named_modules()
        for name, child in holder._modules.items()
        if isinstance(child, WeightQuantizer)
    ]
    if not holders:
        raise UserError("nothing to lower: this model has no quantized weight; call octavo.quantize first")
    waiting = [child.name for _, _, _, child in holders if child.mode is not Mode.QUANTIZE]
    if waiting:
        raise UserError(f"quantizer '{waiting[0]}' has no range yet: calibrate before lowering")
    packed: dict[int, PackedWeight] = {}
    for path, holder, name, quantizer in holders:
        key = weight_key(path, holder)
        owner_path, _, parameter_name = key.rpartition(".")
        owner = model.get_submodule(owner_path)
        if id(quantizer) not in packed:
            packed[id(quantizer)] = PackedWeight(quantizer, owner.get_parameter(parameter_name))
        _replace(owner, parameter_name, packed[id(quantizer)])
        del holder._modules[name]
    return model


def _replace(owner: nn.Module, name: str, packed: PackedWeight) -> None:
    del owner._parameters[name]
    owner.add_module(f"packed_{name}", packed)
    cls = type(owner)
    names = {name}
    if "octavo_lowered" in vars(cls):
        names |= {key for key, value in vars(cls).items() if isinstance(value, property)}
        cls = cls.__mro__[1]
    owner.__class__ = _lowered_class(cls, tuple(sorted(names)))


def is_lowered(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is codes only."""
    return any(isinstance(module, PackedWeight) for module in model.modules())
