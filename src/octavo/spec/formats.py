"""The catalogue of tensor formats, by name. To add one, add a line: batteries and tables pick it up."""

from __future__ import annotations

import difflib

from octavo.errors import UserError
from octavo.spec.element import E2M1, E4M3, E5M2, INT2, INT3, INT4, INT5, INT6, INT7, INT8, ElementFormat, IntFormat
from octavo.spec.tensor_format import PLAIN_FP32, PerChannel, PerGroup, PerTensor, PerToken, TensorFormat, scaled

_SCALED: tuple[ElementFormat, ...] = (INT2, INT3, INT4, INT5, INT6, INT7, INT8, E4M3, E5M2)


def _catalogue() -> dict[str, TensorFormat]:
    formats: dict[str, TensorFormat] = {}
    for element in _SCALED:
        for suffix, granularity in (
            ("tensor", PerTensor()),
            ("channel", PerChannel()),
            ("token", PerToken()),
            ("group32", PerGroup(32)),
            ("group64", PerGroup(64)),
            ("group128", PerGroup(128)),
        ):
            formats[f"{element.name}-{suffix}"] = scaled(element, granularity)
            if isinstance(element, IntFormat):
                formats[f"{element.name}-{suffix}-asymmetric"] = scaled(element, granularity, asymmetric=True)
    return formats


FORMATS: dict[str, TensorFormat] = _catalogue()

NVFP4 = TensorFormat(E2M1, PerGroup(16), scale=TensorFormat(E4M3, PerTensor(), scale=PLAIN_FP32))
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
