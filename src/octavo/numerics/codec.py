"""Rounding to an element format, and the codes of what was rounded.

Everything is fp32 arithmetic on tensors of any shape, on any device, without gradient (a
straight-through estimate is the caller's business). ``round_to`` finds the nearest representable
value, ``encode`` names it, ``decode`` says what a name stands for.
"""

from __future__ import annotations

import math
from functools import cache
from typing import assert_never

import torch
from torch import Tensor

from octavo.spec.element import CodebookFormat, ElementFormat, FloatFormat, IntFormat

_FP32_EXPONENT = 0x7F800000  # exponent field of an fp32 bit pattern
_FP32_MAGNITUDE = 0x7FFFFFFF  # everything but the sign


def round_to(x: Tensor, element: ElementFormat) -> Tensor:
    """Nearest representable value of every entry, as fp32.

    A tie goes to the even code (E8M0: up); what lies outside the range, infinities included, saturates; NaN stays NaN.
    Zero results keep their sign in signed floats and are +0 elsewhere, so that ``decode(encode(.))`` gives the
    same bits. The fp32 element returns its input (infinities too).

    >>> from octavo.spec.element import E2M1
    >>> round_to(torch.tensor([0.25, 0.75, 2.5, 5.0, -1e9]), E2M1).tolist()
    [0.0, 1.0, 2.0, 4.0, -6.0]
    """
    return round_owned(x.detach().to(torch.float32, copy=True), element)


def round_owned(y: Tensor, element: ElementFormat) -> Tensor:
    """``round_to`` for an fp32 tensor that nobody else needs: it may be overwritten. Use the result, not ``y``."""
    match element:
        case IntFormat():
            return _round_int(y, element)
        case FloatFormat():
            return _round_float(y, element)
        case CodebookFormat():
            nearest = torch.bucketize(y.contiguous(), y.new_tensor(thresholds(element)), out_int32=True)
            return torch.where(y.isnan(), y, y.new_tensor(element.values)[nearest])
        case _:
            assert_never(element)


def encode(values: Tensor, element: ElementFormat) -> Tensor:
    """Codes of values that are already on the grid (what ``round_to`` returns).

    Returns:
        Of the same shape: int8 for signed integers, uint8 for unsigned integers, codebooks and the bit patterns
        of small floats; the element's own dtype for fp32, fp16 and bf16. A NaN where the element has none
        gives an arbitrary code: callers check first.

    >>> from octavo.spec.element import E2M1
    >>> encode(torch.tensor([0.5, -0.0, 6.0, -6.0]), E2M1).tolist()
    [1, 8, 7, 15]
    """
    match element:
        case IntFormat():
            return (values / element.unit).to(torch.int8 if element.is_signed else torch.uint8)
        case FloatFormat():
            wide = _torch_dtype(element)
            return _encode_float(values.float(), element) if wide is None else values.to(wide)
        case CodebookFormat():
            book = _table(element, values.device)
            index = torch.bucketize(values.float().contiguous(), book, out_int32=True)
            return index.clamp_(max=len(element.values) - 1).to(torch.uint8)
        case _:
            assert_never(element)


def decode(codes: Tensor, element: ElementFormat) -> Tensor:
    """The values that ``codes`` stand for, as fp32.

    >>> from octavo.spec.element import E4M3
    >>> decode(torch.tensor([0x7E, 0x01, 0xFF], dtype=torch.uint8), E4M3).tolist()
    [448.0, 0.001953125, nan]
    """
    if isinstance(element, IntFormat):
        return codes.float() * element.unit
    if isinstance(element, FloatFormat) and _torch_dtype(element) is not None:
        return codes.to(torch.float32, copy=True)  # of fp32 too: nobody expects a view of the codes
    return _table(element, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def _round_int(y: Tensor, element: IntFormat) -> Tensor:
    if element.unit != 1:
        y = y.div_(element.unit)
    # Past the clamp fp32 has no room for fractions above 1.5 * 2^23: adding it rounds, ties to even, and -0 becomes +0.
    magic = 1.5 * 2.0**23
    y = y.clamp_(element.min_code, element.max_code).add_(magic).sub_(magic)
    return y if element.unit == 1 else y.mul_(element.unit)


def _round_float(y: Tensor, element: FloatFormat) -> Tensor:
    wide = _torch_dtype(element)
    if wide is torch.float32:
        return y
    if element.mantissa_bits == 0:
        return _round_power(y, element)
    y = y.clamp_(element.min if element.is_signed else 0.0, element.max)
    if wide is not None:
        return y.to(wide).float()
    # 2^e of every value, not below the subnormals' exponent, times 1.5 * 2^(23 - m): the sum has the element's last bit
    # as its own last bit, so the addition itself rounds to even. Exact while m < 21.
    exponent = y.view(torch.int32).bitwise_and(_FP32_EXPONENT).view(torch.float32)
    magic = exponent.clamp_(min=2.0**element.min_exponent).mul_(1.5 * 2.0 ** (23 - element.mantissa_bits))
    return y.add(magic).sub_(magic).copysign_(y)


def _round_power(y: Tensor, element: FloatFormat) -> Tensor:
    """Unsigned powers of two (E8M0): no even mantissa to go to, so a tie goes up, as in torch and ml_dtypes.

    What is not positive gives the smallest one.
    """
    y = y.clamp_(element.min, element.max)
    bits = y.view(torch.int32)
    code = (bits + 0x400000) >> 23
    code = torch.where(bits < 0x800000, (bits >= 0x600000).int(), code)  # subnormals in fp32: 2^-127 alone fits
    return torch.where(y.isnan(), y, power_of_two(code - 127))


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` as fp32, exactly, for int32 exponents in [-127, 127].

    >>> power_of_two(torch.tensor([-127, 0, 3], dtype=torch.int32)).tolist()
    [5.877471754111438e-39, 1.0, 8.0]
    """
    bits = (exponent.int() + 127) << 23
    return torch.where(bits == 0, 0x400000, bits).view(torch.float32)


def _encode_float(values: Tensor, element: FloatFormat) -> Tensor:
    bits = values.view(torch.int32)
    magnitude = bits & _FP32_MAGNITUDE
    if element.mantissa_bits == 0:
        return (magnitude >> 23).to(torch.uint8)  # bias 127: the exponent field is the code, NaN is 255
    shift, rebias = 23 - element.mantissa_bits, (127 - element.bias) << element.mantissa_bits
    normal = (magnitude >> shift) - rebias
    subnormal = (values.abs() / element.min_subnormal).int()
    code = torch.where(values.abs() < 2.0**element.min_exponent, subnormal, normal)
    if element.nan != "none":
        code = torch.where(values.isnan(), (1 << (element.bits - 1)) - 1, code)
    if element.nan == "ieee":
        infinity = ((1 << element.exponent_bits) - 1) << element.mantissa_bits
        code = torch.where(values.isinf(), infinity, code)
    sign = (bits >> 31) & (1 << (element.bits - 1))
    return (code | sign).to(torch.uint8)


def _torch_dtype(element: FloatFormat) -> torch.dtype | None:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(element.name)


def _table(element: FloatFormat | CodebookFormat, device: torch.device) -> Tensor:
    return torch.tensor(_code_values(element), dtype=torch.float32, device=device)


@cache
def _code_values(element: FloatFormat | CodebookFormat) -> tuple[float, ...]:
    """The value of every code, in the order of the codes."""
    if isinstance(element, CodebookFormat):
        return element.values
    magnitudes = [_magnitude(code, element) for code in range(1 << (element.bits - int(element.is_signed)))]
    return (*magnitudes, *(-m for m in magnitudes)) if element.is_signed else tuple(magnitudes)


def _magnitude(code: int, element: FloatFormat) -> float:
    exponent, mantissa = divmod(code, 1 << element.mantissa_bits)
    top = (1 << element.exponent_bits) - 1
    if element.nan == "ieee" and exponent == top:
        return math.nan if mantissa else math.inf
    if element.nan == "top" and exponent == top and mantissa == (1 << element.mantissa_bits) - 1:
        return math.nan
    if exponent == 0 and element.mantissa_bits:
        return mantissa * element.min_subnormal
    return float(2.0 ** (exponent - element.bias) * (1 + mantissa / (1 << element.mantissa_bits)))


@cache
def thresholds(element: CodebookFormat) -> tuple[float, ...]:
    """The largest fp32 that still rounds down, between every two neighbours."""
    return tuple(
        _last_below((low + high) / 2, is_tie_below=index % 2 == 0)
        for index, (low, high) in enumerate(zip(element.values, element.values[1:], strict=False))
    )


def _last_below(middle: float, *, is_tie_below: bool) -> float:
    nearest = torch.tensor(middle, dtype=torch.float32)
    belongs_above = nearest.item() > middle or (nearest.item() == middle and not is_tie_below)
    return torch.nextafter(nearest, torch.tensor(-math.inf)).item() if belongs_above else nearest.item()
