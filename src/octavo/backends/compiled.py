"""Rounding by loops that were compiled on this machine: one pass over memory, for CPU tensors.

The loops are in ``rounding.cpp``; ``native`` builds and keeps them. Until they are there this backend refuses, and the
next one computes the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, assert_never

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.backends.native import LIBRARY
from octavo.numerics import qtensor, scaling
from octavo.numerics.codec import thresholds
from octavo.spec.element import CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Shape,
    TensorFormat,
    one_level,
)

_SEGMENT = 4096  # values of a row where a tensor has no rows of its own
_LONGEST_BOOK = 16  # the search for the nearest entry is linear
_LONGEST_SUM = 1 << 16  # as in ``rounding.cpp``
_SAMPLE = ("int8-channel", "int4-group32-asymmetric", "e4m3-tensor", "mxint8", "nvfp4", "nf4")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Element(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "bits", "mantissa_bits", "bias", "nan_code", "num_values")),
        *((name, ctypes.c_float) for name in ("low", "high", "unit", "min_normal", "subnormals_per_one")),
        *((name, ctypes.POINTER(ctypes.c_float)) for name in ("values", "thresholds")),
    )


class _Blocks(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("num_values", "width", "size", "matrix_rows", "tile_rows", "is_padded")
    )
    num_values: int
    width: int
    size: int

    @property
    def num_rows(self) -> int:
        return math.ceil(self.num_values / self.width)

    @property
    def num_groups(self) -> int:
        """In a row."""
        return math.ceil(self.width / self.size)


class _Threads(ctypes.Structure):
    """As in ``rounding.cpp``."""

    _fields_ = (("run", ctypes.c_void_p), ("count", ctypes.c_int32))


class CompiledBackend:
    """Integers, small floats and short codebooks on CPU, computed in fp32."""

    name = "compiled"

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an element of at most 8 bits, for tensors in this machine's memory."""
        if x.device.type != "cpu" or not x.is_floating_point() or x.dtype is torch.float64:
            return Support(False, f"compiled loops take fp32, bf16 and fp16 on a CPU, not {x.dtype} on {x.device}")
        if fmt.scale is None or fmt.offset is not None:
            return Support(False, f"{fmt} has no scales, or an offset")
        if not _is_known(fmt.element):
            return Support(False, f"there is no compiled loop for {fmt.element.name}")
        if LIBRARY.get() is None or not _is_exact():
            return Support(False, LIBRARY.reason)
        return Support(True)

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """See ``Loops.amax``."""
        x, dtype = _readable(x)
        blocks = _blocks(tuple(x.shape), granularity)
        out = torch.empty(blocks.num_rows, blocks.num_groups)
        _function("octavo_amax")(dtype, x.data_ptr(), out.data_ptr(), blocks, _threads())
        match granularity:
            case PerTensor():
                return out.amax()
            case PerTile(rows=rows):
                return scaling.amax(out.view(*x.shape[:-1], -1), PerTile(rows, 1))
            case _:
                return _as_scales(out, tuple(x.shape), granularity)

    def min_max(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """See ``Loops.min_max``."""
        x, dtype = _readable(x)
        blocks = _blocks(tuple(x.shape), granularity)
        low, high = torch.empty(2, blocks.num_rows, blocks.num_groups)
        _function("octavo_min_max")(dtype, x.data_ptr(), low.data_ptr(), high.data_ptr(), blocks, _threads())
        match granularity:
            case PerTensor():
                return low.amin(), high.amax()
            case PerTile(rows=rows):
                lows, highs = (part.view(*x.shape[:-1], -1) for part in (low, high))
                return scaling.min_max(lows, PerTile(rows, 1))[0], scaling.min_max(highs, PerTile(rows, 1))[1]
            case _:
                shape = tuple(x.shape)
                return _as_scales(low, shape, granularity), _as_scales(high, shape, granularity)

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.fake_quantize``."""
        values, dtype = _readable(x)
        out = torch.empty_like(values)
        self._round("octavo_fake_quantize", (values, dtype, out), fmt, (scale, zero_point))
        return out.to(x.dtype)

    def codes(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.codes``."""
        values, dtype = _readable(x)
        is_signed = isinstance(fmt.element, IntFormat) and fmt.element.is_signed
        out = torch.empty(values.shape, dtype=torch.int8 if is_signed else torch.uint8)
        self._round("octavo_codes", (values, dtype, out), fmt, (scale, zero_point))
        return out

    def squared_error(self, rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
        """See ``Loops.squared_error``."""
        rows_NS, scale_N = rows_NS.contiguous(), scale_N.float().contiguous()
        (num_rows, width), out = rows_NS.shape, torch.empty_like(scale_N)
        if width > _LONGEST_SUM:
            return scaling.squared_error(rows_NS, scale_N, element)
        pointers = rows_NS.data_ptr(), scale_N.data_ptr(), out.data_ptr()
        _function("octavo_squared_error")(*pointers, num_rows, width, _element(element), _threads())
        return out

    def _round(
        self, function: str, job: tuple[Tensor, int, Tensor], fmt: TensorFormat, by: tuple[Tensor, Tensor | None]
    ) -> None:
        x, dtype, out = job
        shape = tuple(x.shape)
        # Broadcast like the other backends; what does not fit raises here and not in the loops.
        expected = fmt.granularity.scale_shape(shape)
        scale, zero = (None if part is None else part.float().expand(expected).contiguous() for part in by)
        assert scale is not None
        pointers = (x.data_ptr(), out.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr())
        _function(function)(dtype, *pointers, _element(fmt.element), _blocks(shape, fmt.granularity), _threads())


def pack(codes: Tensor, bits: int) -> Tensor | None:
    """``numerics.packing.pack``; ``None`` where the compiled loops cannot do it."""
    if codes.device.type != "cpu" or not codes.numel() or not 1 <= bits < 8 or LIBRARY.get() is None:
        return None
    codes, width = codes.contiguous(), codes.shape[-1]
    out = torch.empty((*codes.shape[:-1], math.ceil(width * bits / 8)), dtype=torch.uint8)
    pointers = codes.data_ptr(), out.data_ptr()
    _function("octavo_pack")(*pointers, codes.numel() // width, width, bits, _threads())
    return out


@cache
def _is_exact() -> bool:
    """Whether what the compiler made of the loops gives the bits of ``numerics`` on values of every kind.

    Compilers differ in what they permit themselves (and ``CXX`` may be a script with options of its own).
    """
    words = torch.arange(1 << 13) * 0x9E3779B1  # a multiplicative hash: bit patterns of all kinds, NaN and subnormals
    x = words.bitwise_and(0xFFFFFFFF).to(torch.int64).sub(1 << 31).to(torch.int32).view(torch.float32).view(64, 128)
    backend = CompiledBackend()
    for name in _SAMPLE:
        fmt = FORMATS[name]
        scale, zero_point = qtensor.stored_scale(x.nan_to_num(0, 1e3, -1e3).clamp(-1e3, 1e3), fmt)
        expected = qtensor.fake_quantize(x, one_level(fmt), scale=scale, zero_point=zero_point)
        found = backend.fake_quantize(x, fmt, scale, zero_point)
        same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
        if not bool(same.all()):
            LIBRARY.give_up(f"this compiler's code does not round exactly ({name}); another one can be named in CXX")
            return False
    return True


def _is_known(element: ElementFormat) -> bool:
    match element:
        case IntFormat(bits=bits, unit=unit):
            return bits <= 8 and math.frexp(unit)[0] == 0.5
        case FloatFormat(bits=bits, mantissa_bits=mantissa, is_signed=is_signed):
            return bits <= 8 and mantissa > 0 and is_signed
        case CodebookFormat(values=values):
            return len(values) <= _LONGEST_BOOK
        case _:
            assert_never(element)


def _readable(x: Tensor) -> tuple[Tensor, int]:
    """``x`` in a dtype that the loops read, without holes, and that dtype's number."""
    x = x.detach()
    x = (x if x.dtype in _DTYPES else x.float()).contiguous()
    return x, _DTYPES[x.dtype]


def _as_scales(ranges: Tensor, shape: Shape, granularity: Granularity) -> Tensor:
    expected = granularity.scale_shape(shape)
    return ranges.view(-1)[: math.prod(expected)].view(expected)


@lru_cache(maxsize=64)
def _element(element: ElementFormat) -> _Element:
    match element:
        case IntFormat():
            return _Element(0, element.bits, low=element.min, high=element.max, unit=element.unit)
        case FloatFormat():
            nan_code = -1 if element.nan == "none" else (1 << (element.bits - 1)) - 1
            return _Element(
                1, element.bits, element.mantissa_bits, element.bias, nan_code,
                low=element.min, high=element.max,
                min_normal=2.0**element.min_exponent, subnormals_per_one=1 / element.min_subnormal,
            )  # fmt: skip
        case CodebookFormat():
            floats = ctypes.c_float * len(element.values)
            found = _Element(2, element.bits, num_values=len(element.values))
            found.values, found.thresholds = floats(*element.values), floats(*thresholds(element))
            return found
        case _:
            assert_never(element)


@lru_cache(maxsize=1024)
def _blocks(shape: Shape, granularity: Granularity) -> _Blocks:
    total = math.prod(shape)
    match granularity:
        case PerTensor():
            rows = math.ceil(total / _SEGMENT)
            return _Blocks(total, _SEGMENT, _SEGMENT, rows, rows, 0)
        case PerChannel() | PerToken():
            width = total // math.prod(granularity.scale_shape(shape))
            return _Blocks(total, width, width, 1, 1, 0)
        case PerGroup(size):
            return _Blocks(total, shape[-1], size, 1, 1, 1)
        case PerTile(rows, cols):
            return _Blocks(total, shape[-1], cols, shape[-2], rows, 1)
        case PerFlatGroup(size):
            return _Blocks(total, size * max(1, _SEGMENT // size), size, 1, 1, 1)
        case _:
            assert_never(granularity)


def _threads() -> _Threads:
    return _Threads(_parallel(), torch.get_num_threads())


@cache
def _parallel() -> int | None:
    """Address of the function by which torch's own threads are set to work; ``None`` where torch has other threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SHAPED = (ctypes.POINTER(_Blocks), ctypes.POINTER(_Threads))
_SIGNATURES: dict[str, tuple[type[Any], ...]] = {
    "octavo_fake_quantize": (_INT, *[_POINTER] * 4, ctypes.POINTER(_Element), *_SHAPED),
    "octavo_codes": (_INT, *[_POINTER] * 4, ctypes.POINTER(_Element), *_SHAPED),
    "octavo_amax": (_INT, *[_POINTER] * 2, *_SHAPED),
    "octavo_min_max": (_INT, *[_POINTER] * 3, *_SHAPED),
    "octavo_squared_error": (
        *[_POINTER] * 3, *[ctypes.c_int64] * 2, ctypes.POINTER(_Element), ctypes.POINTER(_Threads),
    ),
    "octavo_pack": (*[_POINTER] * 2, *[ctypes.c_int64] * 2, _INT, ctypes.POINTER(_Threads)),
}  # fmt: skip


@cache
def _function(name: str) -> Callable[..., None]:
    library = LIBRARY.get()
    assert library is not None, "supports() said yes"
    function = library[name]
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function
