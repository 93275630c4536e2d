"""Element formats: which real values a code stands for. Facts only, no tensors.

Sources: OCP 8-bit floating point specification 1.0 (E4M3, E5M2); OCP microscaling formats 1.0
(E3M2, E2M3, E2M1, E8M0, MXINT8); QLoRA, arXiv:2305.14314 (NF4).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from octavo.errors import UserError


@dataclass(frozen=True, slots=True)
class IntFormat:
    """Two's complement integers (or unsigned ones), times ``unit``.

    ``is_narrow`` leaves the most negative code out, so that the range is symmetric: [-127, 127].

    >>> INT8.min, INT8.max, INT8_NARROW.min
    (-128.0, 127.0, -127.0)
    """

    name: str
    bits: int
    is_signed: bool = True
    is_narrow: bool = False
    unit: float = 1.0

    @property
    def min_code(self) -> int:
        """Smallest stored integer."""
        return -(1 << (self.bits - 1)) + int(self.is_narrow) if self.is_signed else 0

    @property
    def max_code(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.is_signed else (1 << self.bits) - 1

    @property
    def min(self) -> float:
        """Smallest representable value."""
        return self.min_code * self.unit

    @property
    def max(self) -> float:
        """Largest representable value."""
        return self.max_code * self.unit

    @property
    def values(self) -> tuple[float, ...]:
        """Every representable value, ascending."""
        return tuple(code * self.unit for code in range(self.min_code, self.max_code + 1))


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """Small floating-point numbers: sign, exponent with bias, mantissa, subnormals.

    ``nan`` says which codes are not numbers: ``"none"``, ``"top"`` (all exponent and mantissa bits
    set: E4M3), ``"ieee"`` (the whole top exponent is inf and NaN: E5M2, FP32).

    >>> E4M3.max, E5M2.max, E2M1.max, E4M3.min_subnormal
    (448.0, 57344.0, 6.0, 0.001953125)
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    is_signed: bool = True
    nan: Literal["none", "top", "ieee"] = "none"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return int(self.is_signed) + self.exponent_bits + self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Unbiased exponent of the largest value."""
        top = (1 << self.exponent_bits) - 1 - int(self.nan == "ieee")
        if self.nan == "top" and self.mantissa_bits == 0:
            top -= 1
        return top - self.bias

    @property
    def max(self) -> float:
        """Largest representable value."""
        steps = (1 << self.mantissa_bits) - 1
        if self.nan == "top" and self.mantissa_bits > 0:
            steps -= 1
        return float(2.0**self.max_exponent * (1 + steps / (1 << self.mantissa_bits)))

    @property
    def min(self) -> float:
        """Smallest representable value."""
        return -self.max if self.is_signed else self.min_subnormal

    @property
    def min_exponent(self) -> int:
        """Unbiased exponent of the smallest normal value (E8M0 has no subnormals: its first code is 2^-bias)."""
        return 1 - self.bias if self.mantissa_bits else -self.bias

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))

    @property
    def values(self) -> tuple[float, ...]:
        """Every finite value, ascending, zero once. For formats of at most 8 bits."""
        if self.bits > 8:
            raise ValueError(f"{self.name} has too many values to list")
        if self.mantissa_bits == 0:
            return tuple(2.0**e for e in range(self.min_exponent, self.max_exponent + 1))
        steps = 1 << self.mantissa_bits
        subnormal = [i * self.min_subnormal for i in range(steps)]
        normal = [
            2.0**e * (1 + i / steps) for e in range(self.min_exponent, self.max_exponent + 1) for i in range(steps)
        ]
        positive = [v for v in subnormal + normal if v <= self.max]
        return tuple([-v for v in reversed(positive) if v > 0] + positive if self.is_signed else positive)


@dataclass(frozen=True, slots=True)
class CodebookFormat:
    """Values that are simply listed, ascending; the code is the index. A user may bring one of their own.

    Values are kept as the nearest fp32 numbers.

    >>> CodebookFormat("thirds", (-1.0, -1 / 3, 1 / 3, 1.0)).bits
    2
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(map(_as_fp32, self.values))
        if not 2 <= len(values) <= 256:
            raise UserError(f"codebook {self.name!r} has {len(values)} values: a code of 1 to 8 bits names 2 to 256")
        if not all(low < high for low, high in pairwise(values)) or math.isinf(values[0]) or math.isinf(values[-1]):
            raise UserError(
                f"codebook {self.name!r}: values must be finite fp32 numbers in ascending order, no two equal"
            )
        object.__setattr__(self, "values", values)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.values) - 1).bit_length()

    @property
    def max(self) -> float:
        """Largest representable value."""
        return max(self.values)

    @property
    def min(self) -> float:
        """Smallest representable value."""
        return min(self.values)


def _as_fp32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


ElementFormat = IntFormat | FloatFormat | CodebookFormat

INT2, INT3, INT4, INT5, INT6, INT7, INT8 = (IntFormat(f"int{b}", b) for b in range(2, 9))
INT8_NARROW = IntFormat("int8-narrow", 8, is_narrow=True)
UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = (IntFormat(f"uint{b}", b, is_signed=False) for b in range(2, 9))
MXINT8_ELEMENT = IntFormat("mxint8-element", 8, is_narrow=True, unit=2.0**-6)

E4M3 = FloatFormat("e4m3", 4, 3, bias=7, nan="top")
E5M2 = FloatFormat("e5m2", 5, 2, bias=15, nan="ieee")
E3M2 = FloatFormat("e3m2", 3, 2, bias=3)
E2M3 = FloatFormat("e2m3", 2, 3, bias=1)
E2M1 = FloatFormat("e2m1", 2, 1, bias=1)
E8M0 = FloatFormat("e8m0", 8, 0, bias=127, is_signed=False, nan="top")
FP32 = FloatFormat("fp32", 8, 23, bias=127, nan="ieee")
FP16 = FloatFormat("fp16", 5, 10, bias=15, nan="ieee")
BF16 = FloatFormat("bf16", 8, 7, bias=127, nan="ieee")

NF4 = CodebookFormat(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)


def _dynamic8() -> tuple[float, ...]:
    """Seven decades up to 1, the i-th with 2^i values (the middles of equal parts), of both signs; 0 and 1 besides."""
    positive = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (index + 0.5) / 2**decade)
        for decade in range(7)
        for index in range(2**decade)
    ]
    return tuple(sorted([-value for value in positive] + positive + [0.0, 1.0]))


DYNAMIC8 = CodebookFormat("dynamic8", _dynamic8())
"""8 bits with a relative error that is even over seven decades (Dettmers, arXiv:1511.04561): NF4's scales."""

ELEMENTS: dict[str, ElementFormat] = {
    element.name: element
    for element in (
        INT2, INT3, INT4, INT5, INT6, INT7, INT8, INT8_NARROW,
        UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8, MXINT8_ELEMENT,
        E4M3, E5M2, E3M2, E2M3, E2M1, E8M0, FP32, FP16, BF16, NF4, DYNAMIC8,
    )
}  # fmt: skip


def element_to_json(element: ElementFormat) -> str | dict[str, Any]:
    """The element's name, or a user's codebook written out."""
    if isinstance(element, CodebookFormat) and ELEMENTS.get(element.name) != element:
        return {"name": element.name, "values": list(element.values)}
    return element.name


def element_from_json(data: str | dict[str, Any]) -> ElementFormat:
    """What ``element_to_json`` wrote.

    Raises:
        UserError: a codebook that is none, or that takes the name of another element.
        KeyError, TypeError: not an element.
    """
    if not isinstance(data, dict):
        return ELEMENTS[data]
    codebook = CodebookFormat(str(data["name"]), tuple(map(float, data["values"])))
    if ELEMENTS.get(codebook.name, codebook) != codebook:
        raise UserError(f"codebook {codebook.name!r} is not the element of this name: give it another")
    return codebook
