"""QTensor: codes with their scales; how a tensor becomes one, and what it stands for.

``quantize`` and ``fake_quantize`` are the same arithmetic: fp32, IEEE division by the scale, rounding to the element's
grid. The first names the grid points, the second only looks at them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.codec import decode, encode, round_owned, round_to
from octavo.numerics.loops import Loops
from octavo.numerics.scaling import (
    amax,
    divisor,
    expand_scale,
    from_blocks,
    min_max,
    ordered_sum,
    outer_scale_from_amax,
    scale_from_amax,
    scale_from_range,
    to_blocks,
    zero_point_from,
)
from octavo.spec.element import FloatFormat, IntFormat
from octavo.spec.tensor_format import PLAIN_FP32, Granularity, ScaleRule, Shape, TensorFormat


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

    def to(self, device: torch.device) -> QTensor:
        """The same on another device."""
        return QTensor(
            self.codes.to(device),
            None if self.scale is None else self.scale.to(device),
            self.format,
            self.shape,
            None if self.zero_point is None else self.zero_point.to(device),
            None if self.offset is None else self.offset.to(device),
        )

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
    x: Tensor,
    fmt: TensorFormat,
    *,
    scale: Tensor | QTensor | None = None,
    zero_point: Tensor | None = None,
    outer_scale: Tensor | None = None,
    loops: Loops | None = None,
) -> QTensor:
    """``x`` in ``fmt``.

    Args:
        x: Any float dtype and shape that ``fmt`` fits.
        fmt: The format.
        scale: Of the format's scale shape, real-valued or already quantized; found from ``x`` when ``None``.
        zero_point: Its zero points, for an asymmetric format whose ``scale`` is given.
        outer_scale: Scales of ``fmt.outermost`` where the levels below are found from ``x`` (or rounded from a
            real-valued ``scale``): the calibrated one of an NVFP4 activation. The same as ``scale`` where the format
            is not nested.
        loops: A faster way to the same bits, for this tensor and format.

    Raises:
        UserError: the format does not fit the shape, ``scale`` and ``zero_point`` do not fit the format, or ``x``
            holds NaN or infinities and its range was to be found.

    >>> from octavo.spec.formats import tensor_format
    >>> q = quantize(torch.tensor([[1.0, -14.0]]), tensor_format("int4-tensor"))
    >>> q.codes.tolist(), q.scale.tolist(), q.nbytes
    ([[0, -7]], 2.0, 5)
    """
    scale, outer_scale = _named_levels(fmt, scale, outer_scale)
    _check_fit(x, fmt, scale, zero_point)
    shape = tuple(x.shape)
    if fmt.scale is None:
        return QTensor(encode(round_to(x, fmt.element), fmt.element), None, fmt, shape)
    parts = _find_parts(x, fmt, _Given(scale, zero_point, outer_scale, loops), quantize_scale)
    if scale is None and not bool(_values(parts.scale).isfinite().all()):
        raise UserError(f"a tensor of shape {shape} holds NaN or infinite values: {fmt} has no range for them")
    codes = _codes(x, fmt, parts, loops)
    points = None if parts.zero_point is None else parts.zero_point.to(_code_dtype(fmt.zero_point))
    return QTensor(codes, parts.scale, fmt, shape, points, parts.offset)


def fake_quantize(
    x: Tensor,
    fmt: TensorFormat,
    *,
    scale: Tensor | QTensor | None = None,
    zero_point: Tensor | None = None,
    outer_scale: Tensor | None = None,
    loops: Loops | None = None,
) -> Tensor:
    """``quantize(x, ...).dequantize(x.dtype)``, bit for bit, without building codes.

    A NaN stays NaN, also in formats without a code for it. Where the range is found from ``x``, a NaN or an infinity
    makes its whole block NaN, and in a nested format without ``outer_scale`` all that shares the outermost scale;
    with a given scale an infinity saturates.
    """
    scale, outer_scale = _named_levels(fmt, scale, outer_scale)
    _check_fit(x, fmt, scale, zero_point)
    if fmt.scale is None:
        return round_to(x, fmt.element).to(x.dtype)
    parts = _find_parts(x, fmt, _Given(scale, zero_point, outer_scale, loops), _fake_quantize_scale)
    return _simulated(x, fmt, parts, loops)


def quantize_scale(
    values: Tensor, fmt: TensorFormat, *, scale: Tensor | QTensor | None = None, outer_scale: Tensor | None = None
) -> Tensor | QTensor:
    """Real-valued scales as they are stored in ``fmt``: fp32 as they are, all else quantized.

    Unlike ``quantize``, a scale never becomes 0: it stops at the smallest positive value of a float format or at the
    first code of an integer one. With ``scale`` the scales' own scale is given (the calibrated one of an NVFP4
    activation, say), with ``outer_scale`` that of their outermost level.
    """
    if fmt == PLAIN_FP32:
        return values.float()
    return quantize(_floored(values, fmt, scale, outer_scale), fmt, scale=scale, outer_scale=outer_scale)


def stored_scale(x: Tensor, fmt: TensorFormat, *, loops: Loops | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales that cover ``x``, as real values on the grid of their own format, and zero points (or ``None``).

    ``fake_quantize(x, fmt, scale=...)`` with them gives the bits of ``fake_quantize(x, fmt)``.
    """
    parts = _find_parts(x, fmt, _Given(loops=loops), _fake_quantize_scale)
    return _values(parts.scale), parts.zero_point


@dataclass(frozen=True, slots=True)
class _Parts:
    scale: Tensor | QTensor
    zero_point: Tensor | None
    offset: Tensor | QTensor | None


@dataclass(frozen=True, slots=True)
class _Given:
    """What a caller knows of a tensor's scales."""

    scale: Tensor | QTensor | None = None
    zero_point: Tensor | None = None
    outer: Tensor | None = None
    loops: Loops | None = None

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        return amax(x, granularity) if self.loops is None or not x.numel() else self.loops.amax(x, granularity)

    def min_max(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
        return min_max(x, granularity) if self.loops is None or not x.numel() else self.loops.min_max(x, granularity)


class _Store(Protocol):
    """How real-valued scales become what is multiplied by: with codes, or simulated."""

    def __call__(self, values: Tensor, fmt: TensorFormat, *, outer_scale: Tensor | None) -> Tensor | QTensor: ...


def _fake_quantize_scale(values: Tensor, fmt: TensorFormat, *, outer_scale: Tensor | None = None) -> Tensor:
    if fmt == PLAIN_FP32:
        return values.float()
    return fake_quantize(_floored(values, fmt, None, outer_scale), fmt, outer_scale=outer_scale)


def _store_offset(values: Tensor, fmt: TensorFormat) -> Tensor | QTensor:
    return values if fmt == PLAIN_FP32 else quantize(values, fmt)


def _floored(
    values: Tensor, fmt: TensorFormat, scale: Tensor | QTensor | None, outer_scale: Tensor | None = None
) -> Tensor:
    """Scales whose magnitude is raised to the smallest positive value of their format, which is zero's neighbour."""
    values = values.detach().float()
    smallest = _smallest_positive(fmt)
    if smallest is None:
        return values
    if fmt.scale is not None:
        scale, outer_scale = _named_levels(fmt, scale, outer_scale)
        outer = _values(_find_parts(values, fmt, _Given(scale, None, outer_scale), _fake_quantize_scale).scale)
        blocks, _ = to_blocks(values, fmt.granularity)
        least = expand_scale(outer.abs(), fmt.granularity, tuple(values.shape)) * smallest
        raised = torch.maximum(blocks.abs(), least).copysign(blocks)
        return from_blocks(raised, fmt.granularity, tuple(values.shape))
    return values.abs().clamp(min=smallest).copysign(values)


def _smallest_positive(fmt: TensorFormat) -> float | None:
    """Of a scale's element; ``None`` where a scale may be 0."""
    if fmt.offset is not None or fmt.zero_point is not None:
        return None
    match fmt.element:
        case FloatFormat() as element:
            return element.min_subnormal
        case IntFormat(is_signed=False) as element:
            return element.unit
        case _:
            return None


def _named_levels(
    fmt: TensorFormat, scale: Tensor | QTensor | None, outer_scale: Tensor | None
) -> tuple[Tensor | QTensor | None, Tensor | None]:
    """``outer_scale`` is ``scale`` where the format is not nested."""
    if outer_scale is None or fmt.is_nested:
        return scale, outer_scale
    if scale is not None:
        raise UserError(f"{fmt} has one level of scales: give scale or outer_scale, not both")
    return outer_scale, None


def _find_parts(x: Tensor, fmt: TensorFormat, given: _Given, store: _Store) -> _Parts:
    """What was given, and what was not from ``x``, stored in its own format by ``store``."""
    assert fmt.scale is not None
    scale = given.scale
    offset = None if fmt.offset is None else _store_offset(_block_mean(x, fmt), fmt.offset)
    if isinstance(scale, QTensor):
        return _Parts(scale, given.zero_point, offset)
    if scale is not None:
        return _Parts(store(scale.detach(), fmt.scale, outer_scale=given.outer), given.zero_point, offset)
    centred = x if offset is None else _minus(x, offset, fmt)
    if fmt.zero_point is None:
        return _Parts(_found_scale(centred, fmt, given, store), None, offset)
    low, high = given.min_max(centred, fmt.granularity)
    stored = store(scale_from_range(low, high, fmt)[0], fmt.scale, outer_scale=given.outer)
    return _Parts(stored, zero_point_from(low, _values(stored), fmt), offset)


def _found_scale(x: Tensor, fmt: TensorFormat, given: _Given, store: _Store) -> Tensor | QTensor:
    assert fmt.scale is not None
    outer = given.outer
    if fmt.scale_rule is ScaleRule.FULL_RANGE:
        values, _ = scale_from_range(*given.min_max(x, fmt.granularity), fmt)
        return store(values, fmt.scale, outer_scale=outer)
    if given.loops is not None and store is _fake_quantize_scale and x.numel():
        found = given.loops.scales(x, fmt, outer)
        if found is not None:
            return found
    amaxes = given.amax(x, fmt.granularity)
    if outer is None and fmt.is_nested and _is_chained(fmt.scale):
        outer = _found_outer(amaxes, fmt)
    values = scale_from_amax(amaxes, fmt)
    if fmt.scale_rule is ScaleRule.FOUR_OVER_SIX:
        values = _four_over_six(x, fmt, values, replace(given, outer=outer))
    return store(values, fmt.scale, outer_scale=outer)


def _is_chained(fmt: TensorFormat | None) -> bool:
    """Whether the ranges of all levels follow from one amax: nothing is subtracted on the way."""
    return fmt is None or (fmt.offset is None and fmt.zero_point is None and _is_chained(fmt.scale))


def _found_outer(amaxes: Tensor, fmt: TensorFormat) -> Tensor:
    level = fmt
    while level.scale is not None and level.is_nested:
        level = level.scale
        amaxes = amax(amaxes, level.granularity)
    return outer_scale_from_amax(amaxes, fmt)


def _four_over_six(x: Tensor, fmt: TensorFormat, six: Tensor, given: _Given) -> Tensor:
    """Real-valued scales: amax on 6, or on 4, where levels lie closer, whichever has the smaller squared error.

    Four Over Six (arXiv:2512.02010); errors are those of the scales as stored, and a tie keeps 6.
    """
    assert fmt.scale is not None
    x, errors = x.detach().float(), []
    for values in (six, four := six * 1.5):
        parts = _Parts(_fake_quantize_scale(values, fmt.scale, outer_scale=given.outer), None, None)
        error, dims = to_blocks(_simulated(x, fmt, parts, given.loops).sub_(x).square_(), fmt.granularity)
        errors.append(error.sum(dims) if dims else error)
    return torch.where(errors[1] < errors[0], four, six)


def _simulated(x: Tensor, fmt: TensorFormat, parts: _Parts, loops: Loops | None) -> Tensor:
    if loops is not None and parts.offset is None and x.numel():
        return loops.fake_quantize(x, fmt, _values(parts.scale), parts.zero_point)
    return _real(_grid(x, fmt, parts), fmt, tuple(x.shape), parts).to(x.dtype)


def _codes(x: Tensor, fmt: TensorFormat, parts: _Parts, loops: Loops | None) -> Tensor:
    if loops is not None and parts.offset is None and x.numel():
        return loops.codes(x, fmt, _values(parts.scale), parts.zero_point)
    return encode(from_blocks(_grid(x, fmt, parts), fmt.granularity, tuple(x.shape)), fmt.element)


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
    values = from_blocks(grid, fmt.granularity, shape)
    return values if parts.offset is None else _shifted(values, parts.offset, fmt, sign=1)


def _minus(x: Tensor, offset: Tensor | QTensor, fmt: TensorFormat) -> Tensor:
    return _shifted(x.detach().float(), offset, fmt, sign=-1)


def _shifted(x: Tensor, offset: Tensor | QTensor, fmt: TensorFormat, *, sign: int) -> Tensor:
    shape = tuple(x.shape)
    blocks, _ = to_blocks(x, fmt.offset_blocks)
    moved = blocks.add(expand_scale(_values(offset), fmt.offset_blocks, shape), alpha=sign)
    return from_blocks(moved, fmt.offset_blocks, shape)


def _block_mean(x: Tensor, fmt: TensorFormat) -> Tensor:
    blocks, dims = to_blocks(x.detach().float(), fmt.offset_blocks)
    if not dims:
        return blocks
    filled, _ = to_blocks(torch.ones_like(x, dtype=torch.float32), fmt.offset_blocks)
    shares = blocks / expand_scale(filled.sum(dims), fmt.offset_blocks, tuple(x.shape))
    last = tuple(range(-len(dims), 0))
    return ordered_sum(shares.movedim(dims, last).flatten(-len(dims)).clone())


def _values(part: Tensor | QTensor) -> Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part


def _code_dtype(element: IntFormat | None) -> torch.dtype:
    return torch.int8 if element is not None and element.is_signed else torch.uint8


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
