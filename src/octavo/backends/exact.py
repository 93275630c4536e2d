"""What a compiled backend owes before it is used: the bits of ``numerics`` on values of every kind."""

from __future__ import annotations

import math
from typing import assert_never

import torch

from octavo.numerics import qtensor
from octavo.numerics.loops import Loops
from octavo.spec.element import CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import one_level

_LONGEST_BOOK = 16  # the search for the nearest entry is linear
_SAMPLE = ("int8-channel", "int4-group32-asymmetric", "e4m3-tensor", "mxint8", "nvfp4", "nf4")


def is_small(element: ElementFormat) -> bool:
    """Whether loops are written for ``element``."""
    match element:
        case IntFormat(bits=bits, unit=unit):
            return bits <= 8 and math.frexp(unit)[0] == 0.5
        case FloatFormat(bits=bits, mantissa_bits=mantissa, is_signed=is_signed):
            return bits <= 8 and mantissa > 0 and is_signed
        case CodebookFormat(values=values):
            return len(values) <= _LONGEST_BOOK
        case _:
            assert_never(element)


def first_difference(loops: Loops, device: torch.device) -> str:
    """The first format of a few that ``loops`` round otherwise than ``numerics``; nothing where there is none.

    Compilers differ in what they permit themselves.
    """
    # a multiplicative hash: bit patterns of all kinds, NaN and subnormals
    words = torch.arange(1 << 13, dtype=torch.int64, device="cpu") * 0x9E3779B1
    x = words.bitwise_and(0xFFFFFFFF).sub(1 << 31).to(torch.int32).view(torch.float32).view(64, 128).to(device)
    for name in _SAMPLE:
        fmt = FORMATS[name]
        scale, zero_point = qtensor.stored_scale(x.nan_to_num(0, 1e3, -1e3).clamp(-1e3, 1e3), fmt)
        expected = qtensor.fake_quantize(x, one_level(fmt), scale=scale, zero_point=zero_point)
        found = loops.fake_quantize(x, fmt, scale, zero_point)
        same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
        if not bool(same.all()):
            return name
    return ""
