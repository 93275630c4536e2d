"""Blocks, their ranges, and the scales that follow from them.

A granularity says which values share a scale; the *blocks view* of a tensor is a reshape in which each such set
fills whole axes. Legend: G groups along the last axis, S values in a group, R and C tiles of r rows and c columns.

=================  ======================  ==================  =====================
granularity        blocks view             axes of one block   scale shape
=================  ======================  ==================  =====================
PerTensor          as it is                all                 ``()``
PerChannel(axis)   as it is                after ``axis``      up to ``axis``
PerToken           as it is                last                all but the last
PerGroup(S)        ``(..., G, S)``         last                ``(..., G)``
PerTile(r, c)      ``(..., R, r, C, c)``   -3 and -1           ``(..., R, C)``
PerFlatGroup(S)    ``(G, S)``              last                ``(G,)``
=================  ======================  ==================  =====================

Scales here are real-valued fp32; rounding them to their own format is ``qtensor``'s part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from octavo.errors import UserError
from octavo.numerics.codec import power_of_two, round_owned
from octavo.numerics.loops import Loops
from octavo.spec.element import ElementFormat, IntFormat
from octavo.spec.tensor_format import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleRule,
    Shape,
    TensorFormat,
)

Dims = tuple[int, ...]
_ErrorOf = Callable[[Tensor, Tensor, ElementFormat], Tensor]


def to_blocks(x: Tensor, granularity: Granularity) -> tuple[Tensor, Dims]:
    """The blocks view of ``x`` and the axes that one scale covers (none: every value has its own).

    A copy is made only where a last group is not full: zeros fill it.

    >>> blocks, dims = to_blocks(torch.ones(8, 96), PerGroup(32))
    >>> tuple(blocks.shape), dims
    ((8, 3, 32), (-1,))
    """
    match granularity:
        case PerTensor():
            return x, tuple(range(x.ndim))
        case PerChannel() | PerToken():
            return x, tuple(range(len(granularity.scale_shape(tuple(x.shape))), x.ndim))
        case PerGroup(size):
            return _split(_padded(x, -1, size), -1, size), (-1,)
        case PerTile(rows, cols):
            tiles = _padded(_padded(x, -1, cols), -2, rows)
            return _split(_split(tiles, -1, cols), -3, rows), (-3, -1)
        case PerFlatGroup(size):
            return _split(_padded(x.flatten(), -1, size), -1, size), (-1,)
        case _:
            assert_never(granularity)


def from_blocks(blocks: Tensor, granularity: Granularity, shape: Shape) -> Tensor:
    """The tensor of ``shape`` whose blocks view is ``blocks``."""
    match granularity:
        case PerTensor() | PerChannel() | PerToken():
            return blocks
        case PerGroup():
            return blocks.flatten(-2)[..., : shape[-1]]
        case PerTile():
            return blocks.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]]
        case PerFlatGroup():
            return blocks.flatten()[: math.prod(shape)].view(shape)
        case _:
            assert_never(granularity)


def expand_scale(scale: Tensor, granularity: Granularity, shape: Shape) -> Tensor:
    """``scale`` as a view that broadcasts against the blocks view of a tensor of ``shape``."""
    match granularity:
        case PerTensor():
            return scale
        case PerChannel() | PerToken():
            return scale.reshape(*scale.shape, *(1 for _ in range(len(shape) - scale.ndim)))
        case PerGroup() | PerFlatGroup():
            return scale.unsqueeze(-1)
        case PerTile():
            return scale.unsqueeze(-2).unsqueeze(-1)
        case _:
            assert_never(granularity)


def amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest absolute value of every block, fp32 of the scale's shape; 0 for an empty one, NaN where one is inside."""
    blocks, dims = to_blocks(x, granularity)
    if not blocks.numel():
        return blocks.new_zeros(granularity.scale_shape(tuple(x.shape)), dtype=torch.float32)
    magnitudes = blocks.detach().abs()
    if dims == (-1,):
        # torch is slow at reducing short rows on a CPU: fold them first (NVFP4's groups of 16: 3 times as fast).
        while magnitudes.shape[-1] < 32 and magnitudes.shape[-1] % 2 == 0:
            half = magnitudes.shape[-1] // 2
            magnitudes = torch.maximum(magnitudes[..., :half], magnitudes[..., half:])
    return (magnitudes.amax(dims) if dims else magnitudes).float()


def min_max(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block, fp32 of the scale's shape.

    The last group counts a 0 where it is not full; an empty one is ``(0, 0)``.
    """
    blocks, dims = to_blocks(x.detach(), granularity)
    if not blocks.numel():
        zeros = blocks.new_zeros(granularity.scale_shape(tuple(x.shape)), dtype=torch.float32)
        return zeros, zeros
    if not dims:
        return blocks.float(), blocks.float()
    return blocks.amin(dims).float(), blocks.amax(dims).float()


def scale_from_amax(amax: Tensor, fmt: TensorFormat) -> Tensor:
    """Real-valued scales of a symmetric format, fp32, from the largest absolute value of every block.

    ``AMAX``, ``FULL_RANGE``, ``FOUR_OVER_SIX`` (its "six"): ``amax / fmt.top_value``.
    ``POWER_FLOOR``: ``2^(floor(log2 amax) - floor(log2 element.max))``, the rule of OCP microscaling formats 1.0,
    section 6.3. ``POWER_CEIL``: ``2^ceil(log2(amax / element.max))``. The two powers are found by exponent
    arithmetic, exactly, and kept within 2^-127 .. 2^127.

    Where ``amax`` is 0 (or so small that the quotient vanishes) every code is 0 whatever the scale: it is 1, or 0 where
    the format scales its scales again, so that an empty block does not widen their range. Elsewhere it is at least
    ``fmt.min_scale``. Where ``amax`` is NaN or infinite the scale is NaN: a block without a range has no values.

    >>> from octavo.spec.formats import INT4_G128
    >>> scale_from_amax(torch.tensor([14.0, 0.0]), INT4_G128).tolist()
    [2.0, 1.0]
    """
    return _scale(amax.float(), fmt, fmt.top_value)


def outer_scale_from_amax(amax: Tensor, fmt: TensorFormat) -> Tensor:
    """Scales of the outermost level, fp32, from the largest absolute value of all that shares one of them.

    They make the largest value of every level meet the largest of the level above: ``amax / (6 * 448)`` in NVFP4. A
    format that is not nested gets ``scale_from_amax``.

    >>> from octavo.spec.formats import NVFP4
    >>> outer_scale_from_amax(torch.tensor(2688.0), NVFP4).item()
    1.0
    """
    top = fmt.top_value
    while fmt.scale is not None and fmt.is_nested:
        fmt = fmt.scale
        top *= fmt.top_value
    return _scale(amax.float(), fmt, top)


def outer_scale_from_range(low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """Scales of the outermost level, and zero points, from the range of all that shares one of them.

    A format that is not nested gets ``scale_from_range``; a nested one ``outer_scale_from_amax``, without zero points.
    """
    if fmt.is_nested:
        return outer_scale_from_amax(torch.maximum(-low, high), fmt), None
    return scale_from_range(low, high, fmt)


def _scale(amax: Tensor, fmt: TensorFormat, top: float) -> Tensor:
    match fmt.scale_rule:
        case ScaleRule.AMAX | ScaleRule.FULL_RANGE | ScaleRule.FOUR_OVER_SIX:
            scale = quotient(amax, top)
        case ScaleRule.POWER_FLOOR:
            scale = _power(_exponent(amax) - (math.frexp(top)[1] - 1))
        case ScaleRule.POWER_CEIL:
            exceeds = (amax.view(torch.int32) & 0x7FFFFF) > (amax.new_tensor(top).view(torch.int32) & 0x7FFFFF)
            scale = _power(_exponent(amax) - (math.frexp(top)[1] - 1) + exceeds.int())
        case _:
            assert_never(fmt.scale_rule)
    if fmt.min_scale:
        scale = scale.clamp(min=fmt.min_scale)
    scale = scale.masked_fill((amax == 0) | (scale == 0), _empty_scale(fmt))
    return scale.masked_fill(~amax.isfinite(), math.nan)


def _power(exponent: Tensor) -> Tensor:
    return power_of_two(exponent.clamp(-127, 127))


def scale_from_range(low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points from the range ``[low, high]`` of every block.

    A symmetric format takes the larger magnitude and has no zero point; under ``FULL_RANGE`` the scale is negative
    where that is a positive value. An asymmetric one extends the range to contain 0, spreads its codes over it and
    rounds the zero point, so that 0 is exact. ``(0, 0)`` gives the scale that ``scale_from_amax`` gives to 0.

    Returns:
        fp32 scales; int8 or uint8 zero points of the same shape, or ``None``.
    """
    if fmt.zero_point is None:
        scale = scale_from_amax(torch.maximum(low.abs(), high.abs()), fmt)
        is_flipped = high.abs() > low.abs() if fmt.scale_rule is ScaleRule.FULL_RANGE else None
        return scale if is_flipped is None else torch.where(is_flipped, -scale, scale), None
    element = integer_element(fmt)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    # Halves, so that a range of twice the largest fp32 does not overflow.
    scale = quotient(high / 2 - low / 2, (element.max_code - element.min_code) / 2)
    scale = scale.clamp(min=fmt.min_scale) if fmt.min_scale else scale
    scale = scale.masked_fill((scale == 0) | (low == high), _empty_scale(fmt)).masked_fill(~scale.isfinite(), math.nan)
    return scale, zero_point_from(low, scale, fmt)


def zero_point_from(low: Tensor, scale: Tensor, fmt: TensorFormat) -> Tensor:
    """The code of 0 when ``low``, at most 0, gets the smallest code: rounded and clamped, int8 or uint8."""
    assert fmt.zero_point is not None, "only asymmetric formats have zero points"
    points = integer_element(fmt).min_code - (low.float().clamp(max=0) / divisor(scale)).round()
    points = points.clamp(fmt.zero_point.min_code, fmt.zero_point.max_code)
    return points.to(torch.int8 if fmt.zero_point.is_signed else torch.uint8)


def quotient(x: Tensor, number: float) -> Tensor:
    """``x / number``, rounded once on every device: for a number of Python's, CUDA multiplies by its reciprocal."""
    return x / x.new_full((), number)


def divisor(scale: Tensor) -> Tensor:
    """``scale`` with 1 for 0: a block whose scale was rounded away becomes 0, not NaN."""
    return scale.masked_fill(scale == 0, 1.0)


def integer_element(fmt: TensorFormat) -> IntFormat:
    """The element of an asymmetric format: ``TensorFormat`` admits zero points only with integers."""
    assert isinstance(fmt.element, IntFormat)
    return fmt.element


def search_scale(
    x: Tensor, fmt: TensorFormat, *, steps: int = 40, smallest: float = 0.4, loops: Loops | None = None
) -> Tensor:
    """Scales of a symmetric format that minimise each block's squared error over a fixed grid.

    Candidates are the rule's scale times ``steps`` factors from 1 down to ``smallest``; for the power-of-two rules
    they are its double, itself and its half. Ties keep the larger scale. Memory: a few times 2^20 values on top of
    the input, or one row of blocks where that is more.

    Args:
        x: Weights, any shape that ``fmt`` fits.
        fmt: Symmetric, with plain scales (fp32, fp16, e8m0 ...): scores are computed with the rounded scale.
        steps: Number of factors.
        smallest: The last of them.
        loops: A faster way to the same bits, for this tensor and format.

    Returns:
        fp32 of the scale's shape, on the scale format's grid.

    Raises:
        UserError: the format has zero points or offsets, or its scales are scaled themselves.
    """
    if fmt.scale is None or not fmt.scale.is_plain or not fmt.is_symmetric or fmt.offset is not None:
        raise UserError(f"no scale search for {fmt}: it works on symmetric formats whose scales are not scaled again")
    shape = fmt.granularity.scale_shape(tuple(x.shape))
    blocks, dims = to_blocks(x.detach(), fmt.granularity)
    if not blocks.numel() or not dims:
        return scale_from_amax(amax(x, fmt.granularity), fmt)
    kept = [d for d in range(blocks.ndim) if d not in {d % blocks.ndim for d in dims}]
    rows_NS = blocks.permute(*kept, *dims).reshape(math.prod(shape), -1)
    chunk = max(1, (1 << 20) // rows_NS.shape[1])
    factors, error = _factors(fmt, steps, smallest), squared_error if loops is None else loops.squared_error
    found = [_best_scale(rows.float(), fmt, factors, error) for rows in torch.split(rows_NS, chunk)]
    return torch.cat(found).view(shape)


def _factors(fmt: TensorFormat, steps: int, smallest: float) -> list[float]:
    if fmt.scale_rule in (ScaleRule.POWER_FLOOR, ScaleRule.POWER_CEIL):
        return [1.0, 2.0, 0.5]
    return torch.linspace(1.0, smallest, steps, dtype=torch.float64).tolist()


def _best_scale(
    rows_NS: Tensor,
    fmt: TensorFormat,
    factors: list[float],
    error_of: Callable[[Tensor, Tensor, ElementFormat], Tensor],
) -> Tensor:
    """``(N,)`` scale of each row with the smallest squared error."""
    assert fmt.scale is not None
    first, _ = scale_from_range(rows_NS.amin(1), rows_NS.amax(1), fmt)
    best, best_error = first, torch.full_like(first, math.inf)
    for factor in factors:
        scale = round_owned(first * factor, fmt.scale.element)
        error = error_of(rows_NS, scale, fmt.element)
        is_better = error < best_error
        best, best_error = torch.where(is_better, scale, best), torch.where(is_better, error, best_error)
    return best


def squared_error(rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
    """``(N,)`` squared error of fp32 rows that are rounded with these scales, summed by ``ordered_sum``."""
    scale_N1 = scale_N.unsqueeze(1)
    return ordered_sum(round_owned(rows_NS / scale_N1, element).mul_(scale_N1).sub_(rows_NS).square_())


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the last axis in an order of its own; overwrites ``terms``.

    The second half of what is left is added to the first until one sum is left: more exact than one after the other,
    and the same on every machine.
    """
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms[..., :half] += terms[..., -half:]
        terms = terms[..., : terms.shape[-1] - half]
    return terms.sum(-1)  # of one, or of none


def _empty_scale(fmt: TensorFormat) -> float:
    return 1.0 if fmt.scale is None or fmt.scale.is_plain else 0.0


def _exponent(x: Tensor) -> Tensor:
    """``floor(log2 |x|)`` as int32; -127 for 0 and for every subnormal."""
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros up to the next multiple of ``size`` along ``dim`` (-1 or -2); itself when none is missing."""
    missing = -x.shape[dim] % size
    return pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else x


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """``dim`` as two axes, the second of ``size``."""
    at = dim % x.ndim
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
