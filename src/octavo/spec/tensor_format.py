"""Tensor formats: an element format, where its scales sit, and the format of those scales in turn.

A scale tensor is a tensor, so it has a format of its own: the type is recursive. NVFP4 is E2M1 in
groups of 16, scaled by (E4M3, scaled per tensor by fp32). The type states facts; ``numerics`` computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from octavo.errors import UserError
from octavo.spec.element import (
    ELEMENTS,
    FP32,
    CodebookFormat,
    ElementFormat,
    IntFormat,
    element_from_json,
    element_to_json,
)
from octavo.spec.granularity import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Shape,
    granularity_from_json,
    granularity_to_json,
)

__all__ = [
    "PLAIN_FP32",
    "Granularity",
    "PerChannel",
    "PerFlatGroup",
    "PerGroup",
    "PerTensor",
    "PerTile",
    "PerToken",
    "Ragged",
    "ScaleRule",
    "Shape",
    "TensorFormat",
    "one_level",
    "scaled",
]

_PAD = "let the format fill the last one (ragged: pad), or leave it out"


class ScaleRule(Enum):
    """How a scale follows from the largest absolute value of its block."""

    AMAX = "amax"  # amax / element.max, rounded to the scale's own format
    POWER_FLOOR = "power-floor"  # 2^(floor(log2 amax) - emax): OCP microscaling, may saturate
    POWER_CEIL = "power-ceil"  # 2^ceil(log2(amax / element.max)): never saturates
    FULL_RANGE = "full-range"  # the value of largest magnitude gets the most negative code; scales may be negative
    FOUR_OVER_SIX = "four-over-six"  # amax, or 1.5 times that, whichever has the smaller squared error


class Ragged(Enum):
    """What becomes of a last group or tile that is not full (a flat group may always end early)."""

    REFUSE = "refuse"
    PAD = "pad"


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """``real = scale * (code value - zero_point) + offset``, block by block.

    Args:
        element: What one code means.
        granularity: Which values share a scale.
        scale: Format of the scales; ``None`` for a plain, unscaled tensor.
        offset: Format of a per-block offset that is subtracted first; ``None`` for none.
        zero_point: Element format of the zero points of an asymmetric format; ``None``: symmetric.
        scale_rule: How scales follow from amax.
        ragged: What becomes of a last group that is not full.
        top: Element value that amax is mapped to; ``None``: the element's largest. Below it leaves room, as NVFP4's
            four-over-six does in its scales (256 of 448); above it lets the largest saturate (7.5 in INT4).
        min_scale: Scales are not smaller than this.
        offset_granularity: Which values share an offset; ``None``: those that share a scale.
    """

    element: ElementFormat
    granularity: Granularity = field(default_factory=PerTensor)
    scale: TensorFormat | None = None
    offset: TensorFormat | None = None
    zero_point: IntFormat | None = None
    scale_rule: ScaleRule = ScaleRule.AMAX
    ragged: Ragged = Ragged.REFUSE
    top: float | None = None
    min_scale: float = 0.0
    offset_granularity: Granularity | None = None

    def __post_init__(self) -> None:
        if self.zero_point is not None and not isinstance(self.element, IntFormat):
            raise UserError(f"a zero point needs an integer element, not {self.element.name}: use int2..int8")
        if isinstance(self.element, IntFormat) and self.zero_point is not None and self.element.unit != 1:
            raise UserError(f"a zero point counts in whole codes, {self.element.name} in steps of {self.element.unit}")
        if self.scale is None and (self.zero_point is not None or self.offset is not None):
            raise UserError(f"{self.element.name} without scales has no zero point and no offset: give it scales")
        if self.top is not None and not 0 < self.top < math.inf:
            raise UserError(f"top={self.top}: amax is mapped to a positive value such as {self.element.max:g}")
        if not 0 <= self.min_scale < math.inf:
            raise UserError(f"min_scale={self.min_scale}: the smallest scale is a positive value, or 0 for no limit")
        if self.zero_point is not None and (self.top is not None or self.scale_rule is not ScaleRule.AMAX):
            raise UserError("an asymmetric format spreads its codes over [low, high]: it has no top and no other rule")
        if self.offset_granularity is not None and self.offset is None:
            raise UserError("offset_granularity says which values share an offset: give the offset's format, too")
        if self.scale_rule is ScaleRule.FULL_RANGE:
            self._check_full_range()

    def _check_full_range(self) -> None:
        element, scale = self.element, self.scale
        if not isinstance(element, IntFormat) or not element.is_signed or element.is_narrow or self.top is not None:
            raise UserError(f"full-range is for signed integers with all their codes, without top: not {element.name}")
        if scale is not None and not isinstance(scale.element, CodebookFormat) and not scale.element.is_signed:
            raise UserError(f"full-range scales may be negative: {scale.element.name} cannot hold them")

    @property
    def is_symmetric(self) -> bool:
        """True without zero points."""
        return self.zero_point is None

    @property
    def is_plain(self) -> bool:
        """True for a tensor that is stored as it is, without scales."""
        return self.scale is None

    @property
    def offset_blocks(self) -> Granularity:
        """Which values share an offset."""
        return self.granularity if self.offset_granularity is None else self.offset_granularity

    @property
    def is_nested(self) -> bool:
        """True where the scales have scales again: NVFP4, double quantization."""
        return self.scale is not None and not self.scale.is_plain

    @property
    def outermost(self) -> TensorFormat:
        """The level whose scales are not scaled again: the format itself unless it is nested.

        >>> from octavo.spec.formats import NVFP4
        >>> str(NVFP4.outermost)
        'e4m3 per tensor'
        """
        return self.scale.outermost if self.scale is not None and self.is_nested else self

    @property
    def shares_outer_scale(self) -> bool:
        """True where the scales have one scale per tensor (NVFP4): engines that join tensors keep one for all."""
        return self.is_nested and isinstance(self.outermost.granularity, PerTensor)

    @property
    def top_value(self) -> float:
        """The element value that the largest magnitude of a block is mapped to."""
        if self.top is not None:
            return self.top
        return -self.element.min if self.scale_rule is ScaleRule.FULL_RANGE else self.element.max

    def stored_bytes(self, shape: Shape) -> int:
        """Bytes of codes, scales, offsets and zero points of a tensor of ``shape``; rows of codes end on a byte.

        >>> from octavo.spec.formats import INT4_G128
        >>> INT4_G128.stored_bytes((2, 256))
        272
        """
        rows, width = math.prod(shape[:-1]), (shape[-1] if shape else 1)
        total = rows * math.ceil(width * self.element.bits / 8)
        scale_shape = self.granularity.scale_shape(shape)
        if self.scale is not None:
            total += self.scale.stored_bytes(scale_shape)
        if self.offset is not None:
            total += self.offset.stored_bytes(self.offset_blocks.scale_shape(shape))
        if self.zero_point is not None:
            total += TensorFormat(self.zero_point).stored_bytes(scale_shape)
        return total

    def bits_per_element(self, shape: Shape) -> float:
        """Stored bits per value, scales counted.

        >>> from octavo.spec.formats import NVFP4
        >>> NVFP4.bits_per_element((1024, 1024))
        4.500030517578125
        """
        return 8 * self.stored_bytes(shape) / max(1, math.prod(shape))

    def misfit(self, shape: Shape) -> str | None:
        """Why a tensor of ``shape`` cannot have this format, with what would fit; ``None`` when it can."""
        match self.granularity:
            case PerGroup() if not shape:
                return "groups need an axis, the tensor is a single value"
            case PerGroup(size) if self.ragged is Ragged.REFUSE and shape[-1] % size:
                fitting = [d for d in range(4, size) if shape[-1] % d == 0]
                choice = ", ".join(map(str, fitting)) or "none below it"
                return f"groups of {size} do not divide in_features={shape[-1]}; choose {choice}, or leave it out"
            case PerChannel(axis) if len(shape) > 1 and not -len(shape) <= axis < len(shape):
                return f"there is no axis {axis}, the tensor has shape {shape}"
            case PerTile() if len(shape) < 2:
                return f"tiles need two axes, the tensor has shape {shape}"
            case PerTile(rows, cols) if self.ragged is Ragged.REFUSE and (shape[-2] % rows or shape[-1] % cols):
                return f"{self.granularity} do not divide a {shape[-2]}x{shape[-1]} matrix; {_PAD}"
            case _:
                return None

    def __str__(self) -> str:
        if self.is_plain:
            return self.element.name
        text = f"{self.element.name} {self.granularity}"
        if not self.is_symmetric:
            text += ", asymmetric"
        if self.offset is not None:
            text += ", centred" if self.offset_granularity is None else f", centred {self.offset_granularity}"
        if self.scale_rule is not ScaleRule.AMAX:
            text += f", {self.scale_rule.value}"
        if self.top is not None:
            text += f", amax at {self.top:g}"
        if self.min_scale:
            text += f", scales from {self.min_scale:g}"
        if self.scale is not None and self.scale != PLAIN_FP32:
            text += f", scales {self.scale}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The format as plain JSON values; ``from_dict`` reads it back."""
        beyond: dict[str, Any] = {
            "top": self.top,
            "min_scale": self.min_scale or None,
            "offset_granularity": granularity_to_json(self.offset_granularity) if self.offset_granularity else None,
        }
        return {
            "element": element_to_json(self.element),
            "granularity": granularity_to_json(self.granularity),
            "scale": self.scale.to_dict() if self.scale else None,
            "offset": self.offset.to_dict() if self.offset else None,
            "zero_point": self.zero_point.name if self.zero_point else None,
            "scale_rule": self.scale_rule.value,
            "ragged": self.ragged.value,
            **{name: value for name, value in beyond.items() if value is not None},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorFormat:
        """The format that ``to_dict`` wrote, or a user: all but ``element`` and ``scale`` may be left out.

        Raises:
            UserError: an unknown field, element, granularity or rule.
        """
        try:
            unknown = set(data) - set(cls.__slots__)
            if unknown:
                raise TypeError(f"unknown fields {sorted(unknown)}")
            zero_point = ELEMENTS[data["zero_point"]] if data.get("zero_point") else None
            if zero_point is not None and not isinstance(zero_point, IntFormat):
                raise TypeError(f"zero points are integers, not {zero_point.name}")
            centre = data.get("offset_granularity")
            return cls(
                element=element_from_json(data["element"]),
                granularity=granularity_from_json(data.get("granularity", {"kind": "tensor"})),
                scale=cls.from_dict(data["scale"]) if data["scale"] else None,
                offset=cls.from_dict(data["offset"]) if data.get("offset") else None,
                zero_point=zero_point,
                scale_rule=ScaleRule(data.get("scale_rule", ScaleRule.AMAX.value)),
                ragged=Ragged(data.get("ragged", Ragged.REFUSE.value)),
                top=data.get("top"),
                min_scale=data.get("min_scale", 0.0),
                offset_granularity=None if centre is None else granularity_from_json(centre),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a tensor format: {data!r} ({type(error).__name__}: {error})") from error


PLAIN_FP32 = TensorFormat(FP32)


def scaled(
    element: ElementFormat,
    granularity: Granularity,
    *,
    asymmetric: bool = False,
    rule: ScaleRule = ScaleRule.AMAX,
    ragged: Ragged = Ragged.REFUSE,
) -> TensorFormat:
    """``element`` with fp32 scales; with zero points of the same integers when ``asymmetric``."""
    zero_point = element if asymmetric and isinstance(element, IntFormat) else None
    return TensorFormat(element, granularity, scale=PLAIN_FP32, zero_point=zero_point, scale_rule=rule, ragged=ragged)


def one_level(fmt: TensorFormat) -> TensorFormat:
    """``fmt`` with its scales as real numbers: the same values once the scales are given."""
    return replace(fmt, scale=PLAIN_FP32)
