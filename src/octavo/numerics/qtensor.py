"""QTensor: codes with their scales; how a tensor becomes one, and what it stands for.

``quantize`` and ``fake_quantize`` are the same arithmetic: fp32, IEEE division by the scale, rounding to the element's
grid. The first names the grid points, the second only looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.codec import decode, encode, round_owned, round_to
from octavo.numerics.scaling import (
    amax,
    divisor,
    expand_scale,
    from_blocks,
    min_max,
    scale_from_amax,
    scale_from_range,
    to_blocks,
    zero_point_from,
)
from octavo.spec.element import FloatFormat
from octavo.spec.tensor_format import PLAIN_FP32, Shape, TensorFormat


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A quantized tensor, unpacked: ``real = scale * (value(codes) - zero_point) + offset``.

    Args:
        codes: One code per value, of ``shape``: int8 for signed integers, uint8 for unsigned integers and
            codebooks, and the bit pattern in uint8 for small floats; fp32, fp16 and bf16 as they are.
        scale: Of ``format.granularity.scale_shape(shape)``; itself a QTensor where the scales are quantized.
            ``None`` for a plain format.
        format: What it all means.
        shape: Shape of the values.
        zero_point: Integers of the scale's shape (int8 or uint8), ``None`` when symmetric.
        offset: Of the scale's shape, ``None`` without one.
    """

    codes: Tensor
    scale: Tensor | QTensor | None
    format: TensorFormat
    shape: tuple[int, ...]
    zero_point: Tensor | None = None
    offset: Tensor | QTensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in fp32 and returned as ``dtype``."""
        values = decode(self.codes, self.format.element)
        if self.scale is None:
            return values.to(dtype)
        blocks, _ = to_blocks(values, self.format.granularity)
        return _real(blocks, self.format, self.shape, _Parts(self.scale, self.zero_point, self.offset)).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes when packed: codes (each row padded to bytes), scales, zero points, offsets."""
        total = _packed_bytes(self.codes, self.format.element.bits)
        for part in (self.scale, self.offset):
            total += 0 if part is None else part.nbytes
        if self.zero_point is not None and self.format.zero_point is not None:
            total += _packed_bytes(self.zero_point, self.format.zero_point.bits)
        return total


def quantize(
    x: Tensor, fmt: TensorFormat, *, scale: Tensor | QTensor | None = None, zero_point: Tensor | None = None
) -> QTensor:
    """``x`` in ``fmt``.

    Args:
        x: Any float dtype and shape that ``fmt`` fits.
        fmt: The format.
        scale: Of the format's scale shape, real-valued or already quantized; found from ``x`` when ``None``.
        zero_point: Its zero points, for an asymmetric format whose ``scale`` is given.

    Raises:
        UserError: the format does not fit the shape, or ``scale`` and ``zero_point`` do not fit the format.

    >>> from octavo.spec.formats import tensor_format
    >>> q = quantize(torch.tensor([[1.0, -14.0]]), tensor_format("int4-tensor"))
    >>> q.codes.tolist(), q.scale.tolist(), q.nbytes
    ([[0, -7]], 2.0, 5)
    """
    _check_fit(x, fmt, scale, zero_point)
    shape = tuple(x.shape)
    if fmt.scale is None:
        return QTensor(encode(round_to(x, fmt.element), fmt.element), None, fmt, shape)
    parts = _find_parts(x, fmt, scale, zero_point, quantize_scale)
    codes = encode(from_blocks(_grid(x, fmt, parts), fmt.granularity, shape), fmt.element)
    return QTensor(codes, parts.scale, fmt, shape, parts.zero_point, parts.offset)


def fake_quantize(
    x: Tensor, fmt: TensorFormat, *, scale: Tensor | QTensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """``quantize(x, ...).dequantize(x.dtype)``, bit for bit, without building codes.

    A NaN stays NaN, also in formats without a code for it.
    """
    _check_fit(x, fmt, scale, zero_point)
    if fmt.scale is None:
        return round_to(x, fmt.element).to(x.dtype)
    parts = _find_parts(x, fmt, scale, zero_point, _fake_quantize_scale)
    return _real(_grid(x, fmt, parts), fmt, tuple(x.shape), parts).to(x.dtype)


def quantize_scale(values: Tensor, fmt: TensorFormat, *, scale: Tensor | QTensor | None = None) -> Tensor | QTensor:
    """Real-valued scales as they are stored in ``fmt``: fp32 as they are, all else quantized.

    Unlike ``quantize``, a scale in a float format never becomes 0: it stops at the smallest positive value. With
    ``scale`` the scales' own scale is given (the calibrated one of an NVFP4 activation, say).
    """
    if fmt == PLAIN_FP32:
        return values.float()
    return quantize(_floored(values, fmt, scale), fmt, scale=scale)


@dataclass(frozen=True, slots=True)
class _Parts:
    scale: Tensor | QTensor
    zero_point: Tensor | None
    offset: Tensor | QTensor | None


_Store = Callable[[Tensor, TensorFormat], Tensor | QTensor]


def _fake_quantize_scale(values: Tensor, fmt: TensorFormat) -> Tensor:
    if fmt == PLAIN_FP32:
        return values.float()
    return fake_quantize(_floored(values, fmt, None), fmt)


def _store_offset(values: Tensor, fmt: TensorFormat) -> Tensor | QTensor:
    return values if fmt == PLAIN_FP32 else quantize(values, fmt)


def _floored(values: Tensor, fmt: TensorFormat, scale: Tensor | QTensor | None) -> Tensor:
    """Scales raised to the smallest positive value of their format, which is zero's neighbour."""
    values = values.detach().float()
    if not isinstance(fmt.element, FloatFormat) or fmt.offset is not None:
        return values
    if fmt.scale is None:
        return values.clamp(min=fmt.element.min_subnormal)
    outer = _values(_find_parts(values, fmt, scale, None, _fake_quantize_scale).scale)
    blocks, _ = to_blocks(values, fmt.granularity)
    smallest = expand_scale(outer, fmt.granularity, tuple(values.shape)) * fmt.element.min_subnormal
    return from_blocks(torch.maximum(blocks, smallest), fmt.granularity, tuple(values.shape))


def _find_parts(
    x: Tensor, fmt: TensorFormat, scale: Tensor | QTensor | None, zero_point: Tensor | None, store: _Store
) -> _Parts:
    """What was given, and what was not from ``x``, stored in its own format by ``store``."""
    assert fmt.scale is not None
    offset = None if fmt.offset is None else _store_offset(_block_mean(x, fmt), fmt.offset)
    if isinstance(scale, QTensor):
        return _Parts(scale, zero_point, offset)
    if scale is not None:
        return _Parts(store(scale.detach(), fmt.scale), zero_point, offset)
    centred = x if offset is None else _minus(x, offset, fmt)
    if fmt.zero_point is None:
        return _Parts(store(scale_from_amax(amax(centred, fmt.granularity), fmt), fmt.scale), None, offset)
    low, high = min_max(centred, fmt.granularity)
    stored = store(scale_from_range(low, high, fmt)[0], fmt.scale)
    return _Parts(stored, zero_point_from(low, _values(stored), fmt), offset)


def _grid(x: Tensor, fmt: TensorFormat, parts: _Parts) -> Tensor:
    """Blocks view of the element values (zero point included) nearest to ``x``; nobody else holds it."""
    shape = tuple(x.shape)
    centred = x.detach() if parts.offset is None else _minus(x, parts.offset, fmt)
    blocks, _ = to_blocks(centred, fmt.granularity)
    scaled = blocks.float() / expand_scale(divisor(_values(parts.scale)), fmt.granularity, shape)
    if parts.zero_point is not None:
        scaled = scaled.round_().add_(expand_scale(parts.zero_point, fmt.granularity, shape))
    return round_owned(scaled, fmt.element)


def _real(grid: Tensor, fmt: TensorFormat, shape: Shape, parts: _Parts) -> Tensor:
    """Undo ``_grid``: overwrites it."""
    if parts.zero_point is not None:
        grid = grid.sub_(expand_scale(parts.zero_point, fmt.granularity, shape))
    grid = grid.mul_(expand_scale(_values(parts.scale), fmt.granularity, shape))
    if parts.offset is not None:
        grid = grid.add_(expand_scale(_values(parts.offset), fmt.granularity, shape))
    return from_blocks(grid, fmt.granularity, shape)


def _minus(x: Tensor, offset: Tensor | QTensor, fmt: TensorFormat) -> Tensor:
    shape = tuple(x.shape)
    blocks, _ = to_blocks(x.detach().float(), fmt.granularity)
    return from_blocks(blocks - expand_scale(_values(offset), fmt.granularity, shape), fmt.granularity, shape)


def _block_mean(x: Tensor, fmt: TensorFormat) -> Tensor:
    blocks, dims = to_blocks(x.detach().float(), fmt.granularity)
    if not dims:
        return blocks
    filled, _ = to_blocks(torch.ones_like(x, dtype=torch.float32), fmt.granularity)
    return (blocks / expand_scale(filled.sum(dims), fmt.granularity, tuple(x.shape))).sum(dims)


def _values(part: Tensor | QTensor) -> Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part


def _packed_bytes(codes: Tensor, bits: int) -> int:
    width = codes.shape[-1] if codes.ndim else 1
    return math.prod(codes.shape[:-1]) * math.ceil(width * bits / 8)


def _check_fit(x: Tensor, fmt: TensorFormat, scale: Tensor | QTensor | None, zero_point: Tensor | None) -> None:
    shape = tuple(x.shape)
    reason = fmt.misfit(shape)
    if reason is not None:
        raise UserError(f"a tensor of shape {shape} cannot be {fmt}: {reason}")
    if fmt.scale is None and scale is not None:
        raise UserError(f"{fmt} is a plain format: it takes no scale")
    if (zero_point is not None) != (scale is not None and fmt.zero_point is not None):
        raise UserError(f"{fmt}: a zero point goes with the scale of an asymmetric format; give both, or neither")
    expected = fmt.granularity.scale_shape(shape)
    for name, part in (("scale", scale), ("zero point", zero_point)):
        if part is not None and tuple(part.shape) != expected:
            raise UserError(
                f"{fmt}: a tensor of shape {shape} has a {name} of shape {expected}, not {tuple(part.shape)}"
            )
