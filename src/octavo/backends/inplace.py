"""Rounding by a handful of in-place passes over one buffer, on any device.

A cast to float8 and back, or torch's own fake-quantize, costs four to fifteen times as much on CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.numerics.scaling import divisor, expand_scale, from_blocks, to_blocks
from octavo.spec.element import FloatFormat, IntFormat
from octavo.spec.tensor_format import TensorFormat

_FP32_EXPONENT_MASK = 0x7F800000
_FP32_MANTISSA_BITS = 23
_INTEGER_MAGIC = 1.5 * 2.0**23
_INTEGER_LIMIT = 2.0**20  # far outside of any code, and small enough for the magic number
_PART = 1 << 17  # values rounded at a time on a CPU: they and their powers of two stay in the cache


class InPlaceBackend:
    """Integers and small floats with plain fp32 scales, computed in fp32."""

    name = "in-place"

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an integer or a float of at most 8 bits whose scales are fp32."""
        if fmt.scale is None or not fmt.scale.is_plain or fmt.offset is not None:
            return Support(False, f"{fmt} has scales that are quantized in turn")
        match fmt.element:
            case IntFormat(unit=1.0):
                return Support(True)
            case FloatFormat(bits=bits, mantissa_bits=mantissa) if bits <= 8 and mantissa > 0:
                return Support(True)
            case _:
                return Support(False, f"{fmt.element.name} is not an integer or a small float")

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Backend.fake_quantize``."""
        shape = tuple(x.shape)
        blocks, _ = to_blocks(x, fmt.granularity)
        values = torch.empty_like(blocks, dtype=torch.float32)
        scale = expand_scale(scale, fmt.granularity, shape)
        safe = divisor(scale)
        shift = None if zero_point is None else expand_scale(zero_point.float(), fmt.granularity, shape)
        for source, part in _parts(blocks, values) if scale.ndim == 0 else ((blocks, values),):
            part.copy_(source).div_(safe)
            match fmt.element:
                case IntFormat() as element:
                    _round_integers(part, element, shift)
                case FloatFormat() as element:
                    _round_floats(part, element)
                    part.copysign_(source)  # what rounds to zero keeps its sign, as in hardware
            part.mul_(scale)
        return from_blocks(values, fmt.granularity, shape).to(x.dtype)


def _parts(source: Tensor, target: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Views that together are all of both, which have one shape."""
    if all(x.device.type == "cpu" and x.is_contiguous() for x in (source, target)):
        return zip(source.view(-1).split(_PART), target.view(-1).split(_PART), strict=True)
    return ((source, target),)


def _round_integers(values: Tensor, element: IntFormat, zero_point: Tensor | None) -> None:
    """Round to nearest even by adding and subtracting 1.5 * 2^23, which unlike ``round_`` leaves no negative zero."""
    if zero_point is None:
        values.clamp_(element.min_code, element.max_code).add_(_INTEGER_MAGIC).sub_(_INTEGER_MAGIC)
    else:
        values.clamp_(-_INTEGER_LIMIT, _INTEGER_LIMIT).add_(_INTEGER_MAGIC).sub_(_INTEGER_MAGIC)
        values.add_(zero_point).clamp_(element.min_code, element.max_code).sub_(zero_point)


def _round_floats(values: Tensor, element: FloatFormat) -> None:
    """Round to nearest even by adding and subtracting 1.5 * 2^k.

    In the binade of that constant one unit in the last place is 2^(k-23): k is chosen per value so that this is
    the distance between two neighbours of ``element``. Exact for every fp32 value; the sum never leaves the binade.
    """
    values.clamp_(element.min, element.max)
    powers = torch.bitwise_and(values.view(torch.int32), _FP32_EXPONENT_MASK).view(torch.float32)
    powers.clamp_(min=2.0**element.min_exponent)
    factor = 1.5 * 2.0 ** (_FP32_MANTISSA_BITS - element.mantissa_bits)
    # factor * powers is exact, so it does not matter whether product and sum are fused
    values.add_(powers, alpha=factor).sub_(powers, alpha=factor)
