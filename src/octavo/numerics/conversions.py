"""From one stored format to another without data, and without loss where the target's grid allows it.

Exact are, for instance: MXFP4 to NVFP4 while the powers of two of all groups lie within the 18 that E4M3 has
(2^-9 .. 2^8); INT4 to INT8 in the same groups; an asymmetric INT4 to a symmetric INT8. FP8 in tiles to FP8 per channel
is exact where the tiles of a row differ by powers of two. What is not exact is rounded once, and said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.qtensor import QTensor, quantize, quantize_scale
from octavo.numerics.scaling import amax, expand_scale, from_blocks, to_blocks
from octavo.spec.formats import tensor_format
from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class Conversion:
    """A tensor in another format, and what that changed.

    Args:
        tensor: The converted tensor.
        changed: Blocks, of the new format's scale shape, in which some value is not what it was.
        num_changed: Number of such values.
        relative_error: Norm of the change over the norm of the values; 0 when exact.
    """

    tensor: QTensor
    changed: Tensor
    num_changed: int
    relative_error: float

    @property
    def is_exact(self) -> bool:
        """True when every value is what it was."""
        return self.num_changed == 0


def convert(tensor: QTensor, fmt: TensorFormat | str) -> Conversion:
    """``tensor`` in the format ``fmt``: the nearest to the values that it stands for.

    Two ways to choose the new scales are compared, and the one with the smaller error is taken (block by block where
    the scales are plain): those that ``quantize`` finds, and the old ones, of which a new block gets the largest.

    Args:
        tensor: As it is stored.
        fmt: The new format, or its name in the catalogue.

    Raises:
        UserError: the format does not fit the shape, or has no scales.

    >>> from octavo.spec.formats import tensor_format
    >>> old = quantize(torch.tensor([[0.5, -2.0] * 16]), tensor_format("mxfp4"))
    >>> convert(old, "nvfp4").is_exact
    True
    """
    fmt = tensor_format(fmt) if isinstance(fmt, str) else fmt
    if fmt.scale is None:
        raise UserError(f"{fmt} has no scales: dequantize the tensor instead of converting it")
    values = tensor.dequantize()
    if fmt == tensor.format:
        return _conversion(values, tensor)
    found = quantize(values, fmt)
    kept = _with_old_scales(tensor, values, fmt)
    return _conversion(values, found if kept is None else _better(values, found, kept, fmt))


def _with_old_scales(tensor: QTensor, values: Tensor, fmt: TensorFormat) -> QTensor | None:
    """``values`` on the old scales; ``None`` where the new format cannot take them."""
    if tensor.scale is None or fmt.scale is None or not values.numel():
        return None
    old = tensor.scale.dequantize() if isinstance(tensor.scale, QTensor) else tensor.scale
    zero_point = None
    if fmt.zero_point is not None:
        if tensor.zero_point is None or tensor.format.granularity != fmt.granularity:
            return None
        zero_point = tensor.zero_point
    scales = _merged(old.abs(), values, tensor.format, fmt)
    if not fmt.is_nested:
        return quantize(values, fmt, scale=scales, zero_point=zero_point)
    # The largest scale becomes a power of two in its own element, so that scales which differ by powers stay exact.
    level = fmt.scale
    exponent = math.frexp(level.top_value)[1] - 1
    if level.is_nested or level.offset is not None or level.granularity.scale_shape((2, 2)) != ():
        return None
    outer = (scales.amax() * 2.0**-exponent).float()
    if not bool(outer > 0):
        return None
    return quantize(values, fmt, scale=quantize_scale(scales, level, scale=outer), zero_point=zero_point)


def _merged(old: Tensor, values: Tensor, source: TensorFormat, target: TensorFormat) -> Tensor:
    """Of the target's scale shape: the largest old scale that has a value other than 0 in the new block."""
    shape = tuple(values.shape)
    spread = expand_scale(old, source.granularity, shape).expand_as(to_blocks(values, source.granularity)[0])
    of_each = from_blocks(spread, source.granularity, shape)
    merged = amax(of_each.masked_fill(values == 0, 0.0), target.granularity)
    return merged if target.is_nested else merged.masked_fill(merged == 0, 1.0)


def _better(values: Tensor, found: QTensor, kept: QTensor, fmt: TensorFormat) -> QTensor:
    errors = [_squared_errors(values, q, fmt) for q in (found, kept)]
    if fmt.is_nested or fmt.zero_point is not None or fmt.offset is not None:
        return kept if bool(errors[1].sum() <= errors[0].sum()) else found
    scales = [q.scale.dequantize() if isinstance(q.scale, QTensor) else q.scale for q in (found, kept)]
    assert scales[0] is not None
    assert scales[1] is not None
    return quantize(values, fmt, scale=torch.where(errors[1] <= errors[0], scales[1], scales[0]))


def _squared_errors(values: Tensor, tensor: QTensor, fmt: TensorFormat) -> Tensor:
    """fp64, of the scale's shape."""
    return _sums((tensor.dequantize().double() - values.double()).square(), fmt)


def _sums(values: Tensor, fmt: TensorFormat) -> Tensor:
    blocks, dims = to_blocks(values, fmt.granularity)
    return blocks.sum(dims) if dims else blocks


def _conversion(values: Tensor, tensor: QTensor) -> Conversion:
    difference = tensor.dequantize().double() - values.double()
    is_changed = difference != 0
    norm = float(values.double().norm())
    return Conversion(
        tensor,
        _sums(is_changed.double(), tensor.format) > 0,
        int(is_changed.sum()),
        float(difference.norm()) / norm if norm else 0.0,
    )
