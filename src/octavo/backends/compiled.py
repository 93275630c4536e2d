"""Rounding by loops that were compiled on this machine: one pass over memory, for CPU tensors.

The loops are in ``rounding.cpp``; ``native`` builds and keeps them. Until they are there this backend refuses, and the
next one computes the same bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import assert_never

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.backends.calls import DTYPES, LONGEST_SUM, blocks_of, element_of, function_of, threads
from octavo.backends.native import LIBRARY
from octavo.numerics import qtensor, scaling
from octavo.spec.element import CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import Granularity, PerTensor, PerTile, Shape, TensorFormat, one_level

_LONGEST_BOOK = 16  # the search for the nearest entry is linear
_SAMPLE = ("int8-channel", "int4-group32-asymmetric", "e4m3-tensor", "mxint8", "nvfp4", "nf4")


class CompiledBackend:
    """Integers, small floats and short codebooks on CPU, computed in fp32."""

    name = "compiled"

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an element of at most 8 bits, for tensors in this machine's memory."""
        if x.device.type != "cpu" or not x.is_floating_point() or x.dtype is torch.float64 or x.layout != torch.strided:
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
        blocks = blocks_of(tuple(x.shape), granularity)
        out = _floats(blocks.num_rows, blocks.num_groups)
        function_of("octavo_amax")(dtype, x.data_ptr(), out.data_ptr(), blocks, threads())
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
        blocks = blocks_of(tuple(x.shape), granularity)
        low, high = _floats(2, blocks.num_rows, blocks.num_groups)
        function_of("octavo_min_max")(dtype, x.data_ptr(), low.data_ptr(), high.data_ptr(), blocks, threads())
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
        out = torch.empty_like(values, dtype=torch.int8 if is_signed else torch.uint8)
        self._round("octavo_codes", (values, dtype, out), fmt, (scale, zero_point))
        return out

    def squared_error(self, rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
        """See ``Loops.squared_error``."""
        rows_NS, scale_N = rows_NS.contiguous(), scale_N.float().contiguous()
        (num_rows, width), out = rows_NS.shape, torch.empty_like(scale_N)
        if width > LONGEST_SUM:
            return scaling.squared_error(rows_NS, scale_N, element)
        pointers = rows_NS.data_ptr(), scale_N.data_ptr(), out.data_ptr()
        function_of("octavo_squared_error")(*pointers, num_rows, width, element_of(element), threads())
        return out

    def _round(
        self, function: str, job: tuple[Tensor, int, Tensor], fmt: TensorFormat, by: tuple[Tensor, Tensor | None]
    ) -> None:
        x, dtype, out = job
        shape = tuple(x.shape)
        # Broadcast like the other backends; what does not fit raises here and not in the loops.
        expected = fmt.granularity.scale_shape(shape)
        scale, zero = (
            None if part is None else part.to(x.device, torch.float32).expand(expected).contiguous() for part in by
        )
        assert scale is not None
        pointers = (x.data_ptr(), out.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr())
        function_of(function)(dtype, *pointers, element_of(fmt.element), blocks_of(shape, fmt.granularity), threads())


def pack(codes: Tensor, bits: int) -> Tensor | None:
    """``numerics.packing.pack``; ``None`` where the compiled loops cannot do it."""
    if codes.device.type != "cpu" or not codes.numel() or not 1 <= bits < 8 or LIBRARY.get() is None:
        return None
    codes, width = codes.contiguous(), codes.shape[-1]
    out = codes.new_empty((*codes.shape[:-1], math.ceil(width * bits / 8)), dtype=torch.uint8)
    pointers = codes.data_ptr(), out.data_ptr()
    function_of("octavo_pack")(*pointers, codes.numel() // width, width, bits, threads())
    return out


@cache
def _is_exact() -> bool:
    """Whether what the compiler made of the loops gives the bits of ``numerics`` on values of every kind.

    Compilers differ in what they permit themselves (and ``CXX`` may be a script with options of its own).
    """
    words = (
        torch.arange(1 << 13, dtype=torch.int64, device="cpu") * 0x9E3779B1
    )  # a multiplicative hash: bit patterns of all kinds, NaN and subnormals
    x = words.bitwise_and(0xFFFFFFFF).sub(1 << 31).to(torch.int32).view(torch.float32).view(64, 128)
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
    x = x.detach().resolve_neg()
    x = (x if x.dtype in DTYPES else x.float()).contiguous()
    return x, DTYPES[x.dtype]


def _floats(*shape: int) -> Tensor:
    """Room for what the loops write, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _as_scales(ranges: Tensor, shape: Shape, granularity: Granularity) -> Tensor:
    expected = granularity.scale_shape(shape)
    return ranges.view(-1)[: math.prod(expected)].view(expected)
