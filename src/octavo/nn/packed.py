"""A QTensor among the buffers of a model: it travels with deepcopy, ``state_dict`` and ``.to``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from octavo.backends.codes import pack
from octavo.numerics.packing import unpack
from octavo.numerics.qtensor import QTensor, quantize_scale
from octavo.spec.element import IntFormat
from octavo.spec.tensor_format import PLAIN_FP32, Shape, TensorFormat

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

    def copy_(self, tensor: QTensor) -> None:
        """Write another tensor of the same format and shape into the buffers, so that their identity stays."""
        assert tensor.format == self.format
        fresh = dict(PackedTensor(tensor).named_buffers())
        for name, buffer in self.named_buffers():
            buffer.copy_(fresh[name])

    def _level(self, level: str) -> Tensor | QTensor | None:
        part = self._modules.get(level)
        return part.tensor() if isinstance(part, PackedTensor) else self._buffers.get(level)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTensor:
        """Moves buffers between devices; codes and scales keep their dtype when the model is cast."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def blank_scale(fmt: TensorFormat, shape: Shape) -> QTensor:
    """Quantized scales of ``shape`` that are not known yet: NaN at the outermost level."""
    if fmt.scale is None or fmt.offset is not None or fmt.zero_point is not None:
        return _blank_by_example(fmt, shape)
    inner = fmt.granularity.scale_shape(shape)
    scale = torch.full(inner, torch.nan) if fmt.scale == PLAIN_FP32 else blank_scale(fmt.scale, inner)
    is_signed = isinstance(fmt.element, IntFormat) and fmt.element.is_signed
    return QTensor(torch.zeros(shape, dtype=torch.int8 if is_signed else torch.uint8), scale, fmt, shape)


def _blank_by_example(fmt: TensorFormat, shape: Shape) -> QTensor:
    blank = quantize_scale(torch.ones(shape), fmt)
    assert isinstance(blank, QTensor)
    level = blank
    while isinstance(level.scale, QTensor):
        level = level.scale
    assert level.scale is not None
    level.scale.fill_(torch.nan)
    return blank
