"""How the loops of ``rounding.cpp`` are called: its structures, its functions, torch's threads."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, assert_never

import torch

from octavo.backends.native import LIBRARY
from octavo.numerics.codec import thresholds
from octavo.spec.element import CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.tensor_format import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Shape,
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LONGEST_SUM = 1 << 16
_SEGMENT = 4096  # values of a row where a tensor has no rows of its own


class Element(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "bits", "mantissa_bits", "bias", "nan_code", "num_values")),
        *((name, ctypes.c_float) for name in ("low", "high", "unit", "min_normal", "subnormals_per_one")),
        *((name, ctypes.POINTER(ctypes.c_float)) for name in ("values", "thresholds")),
    )


class Blocks(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("num_values", "width", "size", "matrix_rows", "tile_rows", "is_padded")
    )
    num_values: int
    width: int
    size: int

    @property
    def num_rows(self) -> int:
        """The last one may be short."""
        return math.ceil(self.num_values / self.width)

    @property
    def num_groups(self) -> int:
        """In a row."""
        return math.ceil(self.width / self.size)


class Threads(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = (("run", ctypes.c_void_p), ("count", ctypes.c_int32))


@lru_cache(maxsize=64)
def element_of(element: ElementFormat) -> Element:
    """Every number that rounding to ``element`` needs."""
    match element:
        case IntFormat():
            return Element(0, element.bits, low=element.min, high=element.max, unit=element.unit)
        case FloatFormat():
            nan_code = -1 if element.nan == "none" else (1 << (element.bits - 1)) - 1
            return Element(
                1, element.bits, element.mantissa_bits, element.bias, nan_code,
                low=element.min, high=element.max,
                min_normal=2.0**element.min_exponent, subnormals_per_one=1 / element.min_subnormal,
            )  # fmt: skip
        case CodebookFormat():
            floats = ctypes.c_float * len(element.values)
            found = Element(2, element.bits, num_values=len(element.values))
            found.values, found.thresholds = floats(*element.values), floats(*thresholds(element))
            return found
        case _:
            assert_never(element)


@lru_cache(maxsize=1024)
def blocks_of(shape: Shape, granularity: Granularity) -> Blocks:
    """Which values of a contiguous tensor share a scale."""
    total = math.prod(shape)
    match granularity:
        case PerTensor():
            rows = math.ceil(total / _SEGMENT)
            return Blocks(total, _SEGMENT, _SEGMENT, rows, rows, 0)
        case PerChannel() | PerToken():
            width = total // math.prod(granularity.scale_shape(shape))
            return Blocks(total, width, width, 1, 1, 0)
        case PerGroup(size):
            return Blocks(total, shape[-1], size, 1, 1, 1)
        case PerTile(rows, cols):
            return Blocks(total, shape[-1], cols, shape[-2], rows, 1)
        case PerFlatGroup(size):
            return Blocks(total, size * max(1, _SEGMENT // size), size, 1, 1, 1)
        case _:
            assert_never(granularity)


def threads() -> Threads:
    """As many as torch uses, and torch's own."""
    return Threads(_parallel(), torch.get_num_threads())


@cache
def _parallel() -> int | None:
    """Address of the function by which torch's own threads are set to work; ``None`` where torch has other threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SHAPED = (ctypes.POINTER(Blocks), ctypes.POINTER(Threads))
_SIGNATURES: dict[str, tuple[type[Any], ...]] = {
    "octavo_fake_quantize": (_INT, *[_POINTER] * 4, ctypes.POINTER(Element), *_SHAPED),
    "octavo_codes": (_INT, *[_POINTER] * 4, ctypes.POINTER(Element), *_SHAPED),
    "octavo_amax": (_INT, *[_POINTER] * 2, *_SHAPED),
    "octavo_min_max": (_INT, *[_POINTER] * 3, *_SHAPED),
    "octavo_squared_error": (
        *[_POINTER] * 3, *[ctypes.c_int64] * 2, ctypes.POINTER(Element), ctypes.POINTER(Threads),
    ),
    "octavo_pack": (*[_POINTER] * 2, *[ctypes.c_int64] * 2, _INT, ctypes.POINTER(Threads)),
}  # fmt: skip


@cache
def function_of(name: str) -> Callable[..., None]:
    """A function of the library, which must be there."""
    library = LIBRARY.get()
    assert library is not None, "supports() said yes"
    function = library[name]
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function
