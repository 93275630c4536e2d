"""The scale that errs least: for every block, the best of all scales that its format can store.

Three measures of the error ``e`` of a block: plain ``sum e^2``; weighted ``sum E[x^2] e^2`` (the importance matrix:
what the error costs in the layer's output when inputs are uncorrelated); and ``e G e^T`` with the block's own part of
the Gram matrix of the inputs (what it costs when they are not). Scores are computed with the scale as stored.

Stored scales from a list (E4M3, E8M0): every entry that can win is tried. An entry ``s`` cannot when half of it is in
the list and ``amax <= t s``, where ``t`` is the middle between the largest element value up to ``max / 2`` and its
neighbour above: the grid of ``s / 2`` then holds all that the grid of ``s`` offers. Nor can an entry so small that
clipping the largest value alone costs more than the best one seen. *Four over six* is the choice between two of them.
Stored scales that are nearly continuous (fp32, fp16, bf16) start from a grid of factors and then alternate between the
nearest codes and the scale that is best for these codes, which is a weighted least-squares fit.

Legend: N rows, G groups in a row, S values in a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.codec import encode, power_of_two, round_owned
from octavo.numerics.qtensor import QTensor, quantize_scale
from octavo.numerics.scaling import divisor, integer_element, quotient
from octavo.numerics.weighting import PLAIN, BlockMeasure, Weighting, grouped, measure_of
from octavo.spec.element import ElementFormat, FloatFormat, IntFormat
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerTensor,
    ScaleRule,
    TensorFormat,
)

_AT_ONCE = 1 << 18  # values looked at together: what stays in a core's cache
_NUM_FACTORS = 24
_SMALLEST_FACTOR = 0.45
_NUM_FITS = 3
_SHARES = (1.0, 0.94, 0.88, 0.82, 0.75, 0.67)  # of either end of a range, for zero points
_NUM_LISTED = 18  # entries tried where no bound stops the search
_ROUGH_FACTORS = 4
_ROUGH_SHARES = (1.0, 0.85, 0.7)

Found = tuple[Tensor | QTensor, Tensor | None]


@torch.no_grad()
def search_scales(
    x: Tensor, fmt: TensorFormat, weighting: Weighting = PLAIN, *, outer: Tensor | None = None, is_rough: bool = False
) -> Found:
    """Scales (and zero points) of ``x`` that cost least.

    Args:
        x: A weight ``(..., out_features, in_features)``.
        fmt: A scaled format without offsets.
        weighting: What errors cost.
        outer: fp32 ``()`` scale of the scales, for formats that have one per tensor; unless given, the one of the
            largest block with room above it for scales that exceed the amax rule.
        is_rough: Try few nearly continuous scales and fit none: to tell what a search would cost, not to store.

    Returns:
        What ``quantize(x, fmt, scale=..., zero_point=...)`` takes. Scales are on their own format's grid.

    Raises:
        UserError: the format is plain or centred.
    """
    if fmt.scale is None or fmt.offset is not None:
        raise UserError(f"no scale search for {fmt}: it works on formats with scales and without offsets")
    shape = fmt.granularity.scale_shape(tuple(x.shape))
    if not x.numel():
        return quantize_scale(x.new_ones(shape, dtype=torch.float32), fmt.scale), _no_points(fmt, shape, x)
    x_NGS = grouped(x.detach(), fmt.granularity)
    measure = measure_of(weighting, x, fmt.granularity)
    if fmt.zero_point is not None:
        return _asymmetric(x_NGS, fmt, measure, shape, is_rough=is_rough)
    if _is_listed(fmt.scale):
        return _listed(x_NGS, fmt, measure, shape, outer)
    scale_NG = _by_parts(x_NGS, measure, lambda part, by: _best_free(part, by, fmt, is_rough=is_rough))
    return quantize_scale(scale_NG.view(shape), fmt.scale), None


def outer_scale(tensor_amax: Tensor, fmt: TensorFormat) -> Tensor:
    """The scale of the scales that leaves room above the amax rule, fp32 ``()``.

    The largest scale that can win is ``amax / t`` (see this module), so the block with the largest value must find that
    one inside the range of the scale's element; and by the amax rule it gets a power of two, exactly.

    >>> from octavo.spec.formats import NVFP4
    >>> round(float(outer_scale(torch.tensor(1.0), NVFP4)) * 6 * 256, 3)
    1.0
    """
    assert fmt.scale is not None, "plain formats have no scales"
    largest = min(fmt.scale.top or fmt.scale.element.max, fmt.scale.element.max)
    top = largest * _dominated_from(fmt.element) / fmt.element.max
    room = tensor_amax.float() / (2.0 ** math.floor(math.log2(top)) * fmt.element.max)
    return room.masked_fill(room == 0, 1.0)


def _by_parts(x_NGS: Tensor, measure: BlockMeasure, best: object) -> Tensor:
    """``best`` of as many rows at a time as stay in the cache."""
    assert callable(best)
    step = max(1, _AT_ONCE // (x_NGS.shape[1] * x_NGS.shape[2]))
    found = [
        best(x_NGS[start : start + step], measure.part(slice(start, start + step)))
        for start in range(0, x_NGS.shape[0], step)
    ]
    return torch.cat(found)


def _on_grid(x: Tensor, scale_NG: Tensor, element: ElementFormat) -> Tensor:
    """Element values nearest to ``x / scale``; a new tensor."""
    return round_owned(x / scale_NG.unsqueeze(-1), element)


def _cost(x: Tensor, grid: Tensor, scale_NG: Tensor, measure: BlockMeasure) -> Tensor:
    """Of ``scale * grid`` for ``x``; overwrites ``grid``."""
    error = grid.mul_(scale_NG.unsqueeze(-1)).sub_(x)
    return measure.dot(error, error if measure.may_alias else error.clone())


def _is_listed(scale: TensorFormat) -> bool:
    """Few enough scales to try each: E8M0, or E4M3 under one fp32 per tensor."""
    small = isinstance(scale.element, FloatFormat) and scale.element.bits <= 8 and scale.offset is None
    return small and (scale.is_plain or (isinstance(scale.granularity, PerTensor) and scale.scale == PLAIN_FP32))


def _dominated_from(element: ElementFormat) -> float:
    """``t`` of this module: a scale of at least ``amax / t`` is no better than its half."""
    below = [v for v in element.values if v <= element.max / 2]
    above = next(v for v in element.values if v > element.max / 2)
    return (below[-1] + above) / 2


def _listed(
    x_NGS: Tensor, fmt: TensorFormat, measure: BlockMeasure, shape: tuple[int, ...], outer: Tensor | None
) -> Found:
    assert fmt.scale is not None
    assert isinstance(fmt.scale.element, FloatFormat)
    if not fmt.scale.is_plain and outer is None:
        outer = outer_scale(x_NGS.abs().amax(), fmt)
    entries = [v for v in fmt.scale.element.values if v > 0]
    table = x_NGS.new_tensor(entries)
    if outer is not None and not fmt.scale.is_plain:
        table = table * outer
    # below the smallest normal entry halves are missing, so nothing dominates there
    first_normal = next(i for i, v in enumerate(entries) if v >= 2 * 2.0**fmt.scale.element.min_exponent)
    floor = 0 if fmt.scale.element.mantissa_bits == 0 else first_normal
    index = _by_parts(x_NGS, measure, lambda part, by: _best_entry(part, by, fmt.element, table, floor))
    values = x_NGS.new_tensor(entries)[index.view(shape)]
    if fmt.scale.is_plain:
        return values, None
    assert outer is not None
    return QTensor(encode(values, fmt.scale.element), outer.float().reshape(()), fmt.scale, tuple(shape)), None


def _best_entry(x: Tensor, measure: BlockMeasure, element: ElementFormat, table: Tensor, floor: int) -> Tensor:
    """``(N, G)`` index into ``table``, from the largest entry that can win downwards until none can."""
    x, unit = _normalized(x)
    top, where = x.abs().max(-1, keepdim=True)
    top = top.squeeze(-1)
    index = torch.searchsorted(table, (top * unit / _dominated_from(element)).contiguous()) - 1
    index = index.clamp(floor, table.numel() - 1)
    least = measure.least(where)
    best, best_cost = index, torch.full_like(top, math.inf)
    for _ in range(_NUM_LISTED + floor):
        scale = table[index] / unit
        cost = _cost(x, _on_grid(x, scale, element), scale, measure)
        is_better = cost < best_cost
        best, best_cost = torch.where(is_better, index, best), torch.where(is_better, cost, best_cost)
        index = (index - 1).clamp_(min=0)
        clipped = (top - table[index] / unit * element.max).clamp_(min=0).square_().mul_(least)
        if not bool(((clipped < best_cost) & (best_cost > 0)).any()):
            break
    return best


def _best_free(x: Tensor, measure: BlockMeasure, fmt: TensorFormat, *, is_rough: bool) -> Tensor:
    """``(N, G)`` scales, on a grid of factors of the amax rule, then fitted."""
    assert fmt.scale is not None
    x, unit = _normalized(x)
    first = divisor(quotient(x.abs().amax(-1), fmt.element.max))
    best, best_cost = first, torch.full_like(first, math.inf)
    signs = (1, -1) if fmt.scale_rule is ScaleRule.FULL_RANGE else (1,)
    factors = _factors(fmt.element, _ROUGH_FACTORS if is_rough else _NUM_FACTORS)
    for factor in (1.0, *(sign * factor for factor in factors for sign in signs)):
        scale = _stored(first * factor, unit, fmt.scale)
        best, best_cost = _better(x, scale, best, best_cost, fmt, measure)
    for _ in range(0 if is_rough else _NUM_FITS):
        fitted = _stored(_fit(x, best, fmt.element, measure), unit, fmt.scale)
        fitted = torch.where(fitted * best > 0, fitted, best)
        best, best_cost = _better(x, fitted, best, best_cost, fmt, measure)
    return best * unit


def _factors(element: ElementFormat, count: int) -> Iterator[float]:
    """From the largest that can win down to half the amax rule."""
    low = min(1.0, max(_SMALLEST_FACTOR, 1 - 1.5 / max(1.0, element.bits - 2)))
    high = 1.16
    if isinstance(element, FloatFormat):
        high = element.max / _dominated_from(element)
    elif isinstance(element, IntFormat) and element.bits > 6:
        low, high = 0.7, 1.02
    return iter(torch.linspace(high, low, count, dtype=torch.float64).tolist())


def _better(
    x: Tensor, scale: Tensor, best: Tensor, best_cost: Tensor, fmt: TensorFormat, measure: BlockMeasure
) -> tuple[Tensor, Tensor]:
    cost = _cost(x, _on_grid(x, scale, fmt.element), scale, measure)
    is_better = cost < best_cost
    return torch.where(is_better, scale, best), torch.where(is_better, cost, best_cost)


def _fit(x: Tensor, scale: Tensor, element: ElementFormat, measure: BlockMeasure) -> Tensor:
    """The scale with the least cost for the codes that ``scale`` gives."""
    grid = _on_grid(x, scale, element)
    size = measure.dot(grid, grid.clone())
    return measure.dot(grid, x.clone()) / divisor(size)


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every block divided by a power of two so that its largest value is near 1, and these ``(N, G)`` powers.

    Exact, and squares of huge and of tiny values stay inside fp32.
    """
    top = x.abs().amax(-1)
    unit = power_of_two((((top.view(torch.int32) >> 23) & 0xFF) - 127).clamp(-100, 126))
    unit = unit.masked_fill(top == 0, 1.0)
    return x / unit.unsqueeze(-1), unit


def _stored(scale: Tensor, unit: Tensor, fmt: TensorFormat) -> Tensor:
    """As it comes back from its own format where that is a plain one; fp32 until the end elsewhere."""
    return round_owned(scale * unit, fmt.element) / unit if fmt.is_plain else scale


def _asymmetric(
    x_NGS: Tensor, fmt: TensorFormat, measure: BlockMeasure, shape: tuple[int, ...], *, is_rough: bool
) -> Found:
    assert fmt.scale is not None
    assert fmt.zero_point is not None
    both = _by_parts(x_NGS, measure, lambda part, by: _best_range(part, by, fmt, is_rough=is_rough))
    scale, points = both.unbind(-1)
    stored = quantize_scale(scale.reshape(shape).contiguous(), fmt.scale)
    dtype = torch.int8 if fmt.zero_point.is_signed else torch.uint8
    return stored, points.reshape(shape).to(dtype)


def _best_range(x: Tensor, measure: BlockMeasure, fmt: TensorFormat, *, is_rough: bool) -> Tensor:
    """``(N, G, 2)`` scales and zero points: shares of either end of the range, then fitted."""
    element = integer_element(fmt)
    assert fmt.scale is not None
    x, unit = _normalized(x)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    width = float(element.max_code - element.min_code)
    best_cost = torch.full_like(low, math.inf)
    best = torch.stack([torch.ones_like(low), torch.zeros_like(low)], -1)
    shares = _ROUGH_SHARES if is_rough else _SHARES
    for low_share, high_share in product(shares, shares):
        scale = _stored(divisor((high * high_share - low * low_share) / width), unit, fmt.scale)
        best, best_cost = _better_range(x, scale, low * low_share, best, best_cost, fmt, measure)
    for _ in range(0 if is_rough else _NUM_FITS):
        scale, points = best.unbind(-1)
        grid = _shifted_grid(x, scale, points, element)
        size = measure.dot(grid, grid.clone())
        fitted = _stored(measure.dot(grid, x.clone()) / divisor(size), unit, fmt.scale)
        fitted = torch.where(fitted > 0, fitted, scale)
        for shift in (0.0, 1.0, -1.0):
            at = element.min_code - (points + shift)
            best, best_cost = _better_range(x, fitted, at * fitted, best, best_cost, fmt, measure)
    return torch.stack([best[..., 0] * unit, best[..., 1]], -1)


def _better_range(
    x: Tensor, scale: Tensor, low: Tensor, best: Tensor, best_cost: Tensor, fmt: TensorFormat, measure: BlockMeasure
) -> tuple[Tensor, Tensor]:
    element = integer_element(fmt)
    assert fmt.zero_point is not None
    points = (element.min_code - (low / scale).round()).clamp(fmt.zero_point.min_code, fmt.zero_point.max_code)
    cost = _cost(x, _shifted_grid(x, scale, points, element), scale, measure)
    is_better = cost < best_cost
    found = torch.stack([scale, points], -1)
    return torch.where(is_better.unsqueeze(-1), found, best), torch.where(is_better, cost, best_cost)


def _shifted_grid(x: Tensor, scale: Tensor, points: Tensor, element: IntFormat) -> Tensor:
    """Codes minus zero points."""
    codes = (x / scale.unsqueeze(-1)).round_().add_(points.unsqueeze(-1))
    return round_owned(codes, element).sub_(points.unsqueeze(-1))


def _no_points(fmt: TensorFormat, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    if fmt.zero_point is None:
        return None
    return torch.zeros(shape, dtype=torch.int8 if fmt.zero_point.is_signed else torch.uint8, device=x.device)
