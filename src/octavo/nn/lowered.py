"""True compression in memory: packed codes instead of weights, unpacked when a layer is called."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.extras import LOW_RANK, StackBranch
from octavo.nn.packed import PackedTensor
from octavo.nn.parametrized import forget_sources
from octavo.nn.quantizer import Mode, WeightQuantizer
from octavo.nn.snapshot import stored_parameter


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


def _unpacking(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        packed, branch = self._modules[f"packed_{name}"], self._modules.get(f"{name}_{LOW_RANK}")
        assert packed is not None
        weight: Tensor = packed()
        return branch.beside(weight) if isinstance(branch, StackBranch) else weight

    return property(read)


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
        (holder, name, child)
        for holder in model.modules()
        for name, child in holder._modules.items()
        if isinstance(child, WeightQuantizer)
    ]
    if not holders:
        raise UserError("nothing to lower: this model has no quantized weight; call octavo.quantize first")
    waiting = [child.name for _, _, child in holders if child.mode is not Mode.QUANTIZE]
    if waiting:
        raise UserError(f"quantizer '{waiting[0]}' has no range yet: calibrate before lowering")
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    for quantizer in dict.fromkeys(child for _, _, child in holders):
        parameter = stored_parameter(model, quantizer.key)
        packed = PackedWeight(quantizer, parameter)
        for key in keys[id(parameter)]:
            path, _, name = key.rpartition(".")
            _replace(model.get_submodule(path), name, packed)
    for holder, name, _ in holders:
        del holder._modules[name]
    forget_sources(model)
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
