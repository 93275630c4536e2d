"""Rounding by a handful of in-place passes over pieces that stay in the cache, on any device.

A cast to float8 and back, or torch's own fake-quantize, costs four to fifteen times as much on CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.numerics import scaling
from octavo.numerics.codec import encode, round_owned
from octavo.numerics.scaling import divisor, expand_scale, from_blocks, to_blocks
from octavo.spec.element import E4M3, E5M2, CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.tensor_format import Granularity, PerTile, TensorFormat

_FP32_EXPONENT_MASK = 0x7F800000
_FP32_MANTISSA_BITS = 23
_INTEGER_MAGIC = 1.5 * 2.0**23
_INTEGER_LIMIT = 2.0**20  # far outside of any code, and small enough for the magic number
_PART = 1 << 17  # values rounded at a time on a CPU: they and their powers of two stay in the cache

_TORCH_FLOATS: dict[ElementFormat, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}

_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]


class InPlaceBackend:
    """Integers, small floats and codebooks, computed in fp32."""

    name = "in-place"

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an element of at most 8 bits."""
        if fmt.scale is None or fmt.offset is not None:
            return Support(False, f"{fmt} has no scales, or an offset")
        match fmt.element:
            case IntFormat() | CodebookFormat():
                return Support(True)
            case FloatFormat(bits=bits, mantissa_bits=mantissa, is_signed=True) if bits <= 8 and mantissa > 0:
                return Support(True)
            case _:
                return Support(False, f"{fmt.element.name} is not an integer, a small float or a codebook")

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """See ``Loops.amax``."""
        return scaling.amax(x, granularity)

    def min_max(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """See ``Loops.min_max``."""
        return scaling.min_max(x, granularity)

    def scales(self, x: Tensor, fmt: TensorFormat, outer: Tensor | None) -> Tensor | None:
        """See ``Loops.scales``: its parts are fast enough here."""
        return None

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.fake_quantize``."""
        blocks, _ = to_blocks(x.detach(), fmt.granularity)
        values = torch.empty_like(blocks, dtype=torch.float32)
        for source, part, factor, shift in _parts((blocks, values), fmt, scale, zero_point):
            part.copy_(source).div_(divisor(factor))
            rounded = _rounded(part, fmt.element, shift)
            if shift is not None:
                rounded.sub_(shift)
            torch.mul(rounded, factor, out=part)
        return from_blocks(values, fmt.granularity, tuple(x.shape)).to(x.dtype)

    def codes(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.codes``."""
        blocks, _ = to_blocks(x.detach(), fmt.granularity)
        is_signed = isinstance(fmt.element, IntFormat) and fmt.element.is_signed
        codes = torch.empty_like(blocks, dtype=torch.int8 if is_signed else torch.uint8)
        for source, part, factor, shift in _parts((blocks, codes), fmt, scale, zero_point):
            values = source.to(torch.float32, copy=True).div_(divisor(factor))
            part.copy_(_encoded(values, fmt.element, shift))
        return from_blocks(codes, fmt.granularity, tuple(x.shape))

    def squared_error(self, rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
        """See ``Loops.squared_error``."""
        return scaling.squared_error(rows_NS, scale_N, element)


def _parts(pair: tuple[Tensor, Tensor], fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Iterable[_Part]:
    """Pieces of a source, of a target and of what scales them, which broadcast; together they are all of both."""
    source, target = pair
    shift = None if zero_point is None else zero_point.float()
    in_memory = all(x.device.type == "cpu" and x.is_contiguous() for x in pair)
    if not in_memory or isinstance(fmt.granularity, PerTile):
        shape = tuple(source.shape)
        wide = None if shift is None else expand_scale(shift, fmt.granularity, shape)
        return [(source, target, expand_scale(scale, fmt.granularity, shape), wide)]
    if scale.ndim == 0:
        pieces = zip(source.view(-1).split(_PART), target.view(-1).split(_PART), strict=True)
        return ((one, other, scale, shift) for one, other in pieces)
    # Elsewhere the axes of the scales lead: one row for each of them.
    rows = scale.numel()
    num_rows = max(1, _PART // (source.numel() // rows))
    sources, targets, factors = (x.reshape(rows, -1).split(num_rows) for x in (source, target, scale))
    shifts = [None] * len(sources) if shift is None else shift.view(rows, 1).split(num_rows)
    return zip(sources, targets, factors, shifts, strict=True)


def _rounded(values: Tensor, element: ElementFormat, shift: Tensor | None) -> Tensor:
    """Values of ``element``, zero point included; ``values`` may be overwritten.

    Args:
        values: fp32, divided by their scales.
        element: The element format.
        shift: Zero points.
    """
    match element:
        case IntFormat() if shift is not None or element.unit == 1:
            return _round_integers(values, element, shift)
        case FloatFormat():
            return _round_floats(values, element)
        case _:
            return round_owned(values, element)


def _encoded(values: Tensor, element: ElementFormat, shift: Tensor | None) -> Tensor:
    cast = _TORCH_FLOATS.get(element)
    if cast is not None:  # torch rounds as we do once nothing is out of range; nearest code in one pass
        return values.clamp_(element.min, element.max).to(cast).view(torch.uint8)
    return encode(_rounded(values, element, shift), element)


def _round_integers(values: Tensor, element: IntFormat, zero_point: Tensor | None) -> Tensor:
    """Round to nearest even by adding and subtracting 1.5 * 2^23, which unlike ``round_`` leaves no negative zero."""
    if zero_point is None:
        return values.clamp_(element.min_code, element.max_code).add_(_INTEGER_MAGIC).sub_(_INTEGER_MAGIC)
    values.clamp_(-_INTEGER_LIMIT, _INTEGER_LIMIT).add_(_INTEGER_MAGIC).sub_(_INTEGER_MAGIC)
    return values.add_(zero_point).clamp_(element.min_code, element.max_code)


def _round_floats(values: Tensor, element: FloatFormat) -> Tensor:
    """Round to nearest even by adding and subtracting 1.5 * 2^k.

    In the binade of that constant one unit in the last place is 2^(k-23): k is chosen per value so that this is
    the distance between two neighbours of ``element``. Exact for every fp32 value; the sum never leaves the binade.
    """
    values.clamp_(element.min, element.max)
    powers = torch.bitwise_and(values.view(torch.int32), _FP32_EXPONENT_MASK).view(torch.float32)
    powers.clamp_(min=2.0**element.min_exponent)
    factor = 1.5 * 2.0 ** (_FP32_MANTISSA_BITS - element.mantissa_bits)
    # factor * powers is exact, so it does not matter whether product and sum are fused
    rounded = torch.add(values, powers, alpha=factor).sub_(powers, alpha=factor)
    return rounded.copysign_(values)  # what rounds to zero keeps its sign, as in hardware
