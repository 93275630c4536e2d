"""The catalogue of tensor formats, by name. To add one, add a line: batteries and tables pick it up."""

from __future__ import annotations

import difflib

from octavo.errors import UserError
from octavo.spec.element import (
    DYNAMIC8,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT7,
    INT8,
    MXINT8_ELEMENT,
    NF4,
    UINT8,
    ElementFormat,
    IntFormat,
)
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Ragged,
    ScaleRule,
    TensorFormat,
    scaled,
)

_SCALED: tuple[ElementFormat, ...] = (INT2, INT3, INT4, INT5, INT6, INT7, INT8, E4M3, E5M2)
_MICROSCALING: dict[str, ElementFormat] = {
    "mxfp4": E2M1,
    "mxfp6-e3m2": E3M2,
    "mxfp6-e2m3": E2M3,
    "mxfp8": E4M3,
    "mxfp8-e5m2": E5M2,
    "mxint8": MXINT8_ELEMENT,
}
_GROUP_SIZES = (32, 64, 128)
_GRANULARITIES: dict[str, Granularity] = {
    "tensor": PerTensor(),
    "channel": PerChannel(),
    "token": PerToken(),
    **{f"group{size}": PerGroup(size) for size in _GROUP_SIZES},
}


def _of_one_scale() -> dict[str, TensorFormat]:
    """An element with fp32 scales of every granularity; integers also with zero points."""
    formats: dict[str, TensorFormat] = {}
    for element in _SCALED:
        for suffix, granularity in _GRANULARITIES.items():
            formats[f"{element.name}-{suffix}"] = scaled(element, granularity)
            if isinstance(element, IntFormat):
                formats[f"{element.name}-{suffix}-asymmetric"] = scaled(element, granularity, asymmetric=True)
    for element in (INT2, INT3, INT4):
        for size in _GROUP_SIZES:
            full_range = scaled(element, PerGroup(size), rule=ScaleRule.FULL_RANGE)
            formats[f"{element.name}-group{size}-full-range"] = full_range
    formats["e4m3-group128-padded"] = scaled(E4M3, PerGroup(128), ragged=Ragged.PAD)
    formats["e4m3-tile128x128"] = scaled(E4M3, PerTile(128, 128), ragged=Ragged.PAD)
    formats["nf4"] = scaled(NF4, PerFlatGroup(64))
    return formats


def _microscaling() -> dict[str, TensorFormat]:
    """Groups of 32 with power-of-two scales: OCP microscaling 1.0, and with scales that never saturate."""
    return {
        f"{name}{suffix}": TensorFormat(element, PerGroup(32), scale=TensorFormat(E8M0), scale_rule=rule)
        for name, element in _MICROSCALING.items()
        for suffix, rule in (("", ScaleRule.POWER_FLOOR), ("-ceil", ScaleRule.POWER_CEIL))
    }


def _nvfp4(rule: ScaleRule = ScaleRule.AMAX, top: float | None = None) -> TensorFormat:
    scales = TensorFormat(E4M3, PerTensor(), scale=PLAIN_FP32, top=top)
    return TensorFormat(E2M1, PerGroup(16), scale=scales, scale_rule=rule)


def _of_scaled_scales() -> dict[str, TensorFormat]:
    """Scales in 8 bits with scales of their own."""
    blocks_of_256 = TensorFormat(
        DYNAMIC8,
        PerFlatGroup(256),
        scale=PLAIN_FP32,
        offset=PLAIN_FP32,
        offset_granularity=PerTensor(),
    )
    per_row = scaled(UINT8, PerChannel())
    return {
        "nvfp4": _nvfp4(),
        # arXiv:2512.02010: scales reach 256 only, so that 1.5 times the largest still fits into E4M3
        "nvfp4-four-over-six": _nvfp4(ScaleRule.FOUR_OVER_SIX, top=256.0),
        # kernels that unpack to FP8 multiply codes (up to 6) and group scales in it: their product must not exceed 448
        "nvfp4-in-fp8": _nvfp4(top=448 / 6),
        "nf4-double-quant": TensorFormat(NF4, PerFlatGroup(64), scale=blocks_of_256),
        **{f"int4-group{size}-double-quant": TensorFormat(INT4, PerGroup(size), per_row) for size in _GROUP_SIZES},
    }


FORMATS: dict[str, TensorFormat] = {**_of_one_scale(), **_microscaling(), **_of_scaled_scales()}

NVFP4 = FORMATS["nvfp4"]
INT4_G128 = FORMATS["int4-group128"]


def tensor_format(name: str) -> TensorFormat:
    """The catalogue's format called ``name``.

    Raises:
        UserError: there is none; the message names the nearest ones.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.3)
    raise UserError(f"unknown tensor format {name!r}: did you mean {', '.join(near)}?  `octavo formats` lists them all")


def format_name(fmt: TensorFormat) -> str:
    """The catalogue's name of ``fmt``, or its description where it has none."""
    return next((name for name, known in FORMATS.items() if known == fmt), str(fmt))
