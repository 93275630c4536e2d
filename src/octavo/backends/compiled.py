"""Rounding by loops that were compiled on this machine: one pass over memory, for CPU tensors.

The loops are in ``rounding.cpp``; ``native`` builds and keeps them. Until they are there this backend refuses, and the
next one computes the same bits.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.backends.calls import DTYPES, LONGEST_SUM, blocks_of, element_of, function_of, threads
from octavo.backends.exact import first_difference, is_small
from octavo.backends.native import LIBRARY
from octavo.numerics import scaling
from octavo.spec.element import ElementFormat, IntFormat
from octavo.spec.tensor_format import Granularity, PerTensor, PerTile, Shape, TensorFormat


class CompiledBackend:
    """Integers, small floats and short codebooks on CPU, computed in fp32."""

    name = "compiled"

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an element of at most 8 bits, for tensors in this machine's memory."""
        if x.device.type != "cpu" or not x.is_floating_point() or x.dtype is torch.float64 or x.layout != torch.strided:
            return Support(False, f"compiled loops take fp32, bf16 and fp16 on a CPU, not {x.dtype} on {x.device}")
        if fmt.scale is None or fmt.offset is not None:
            return Support(False, f"{fmt} has no scales, or an offset")
        if not is_small(fmt.element):
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

    def scales(self, x: Tensor, fmt: TensorFormat, outer: Tensor | None) -> Tensor | None:
        """See ``Loops.scales``: its parts are fast enough here."""
        return None

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
    """Whether the compiler kept to what is written (``CXX`` may be a script with options of its own)."""
    name = first_difference(CompiledBackend(), torch.device("cpu"))
    if name:
        LIBRARY.give_up(f"this compiler's code does not round exactly ({name}); another one can be named in CXX")
    return not name


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
