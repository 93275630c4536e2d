"""Rounding by Triton's kernels: one pass over memory, for tensors on a CUDA device.

Triton comes with torch where torch has CUDA. It compiles when it first meets a format, and keeps what it compiled on
disk; where it cannot, this backend refuses and the next one computes the same bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from functools import cache, lru_cache
from typing import Any, assert_never

import torch
from torch import Tensor

from octavo.backends.base import Support
from octavo.backends.calls import Blocks, blocks_of
from octavo.backends.exact import first_difference, is_small
from octavo.numerics import scaling
from octavo.numerics.codec import thresholds
from octavo.spec.element import E8M0, CodebookFormat, ElementFormat, FloatFormat, IntFormat
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    Granularity,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    ScaleRule,
    TensorFormat,
)

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST_PIECE = 2048
_EXACT_LAUNCH: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


class GpuBackend:
    """Integers, small floats and short codebooks on CUDA devices, computed in fp32."""

    name = "triton"

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._obstacles: dict[torch.device, str] = {}

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Every scaled format of an element of at most 8 bits, where Triton gives the bits of ``numerics``."""
        if x.device.type != self.device_type or x.dtype not in _DTYPES or x.layout != torch.strided:
            return Support(False, f"Triton's loops take fp32, bf16 and fp16 on a GPU, not {x.dtype} on {x.device}")
        if fmt.scale is None or fmt.offset is not None:
            return Support(False, f"{fmt} has no scales, or an offset")
        if not is_small(fmt.element):
            return Support(False, f"there is no loop for {fmt.element.name}")
        obstacle = self._obstacle(x.device)
        return Support(not obstacle, obstacle)

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """See ``Loops.amax``."""
        size = _group(x, granularity)
        if not size:
            return scaling.amax(x, granularity)
        x = _readable(x)
        out = torch.empty(granularity.scale_shape(tuple(x.shape)), dtype=torch.float32, device=x.device)
        with _on(x.device):
            _kernels().amax_of_groups[_grid(x)](x, out, x.numel(), SIZE=size, BLOCK=_WIDEST_PIECE, **_EXACT_LAUNCH)
        return out

    def scales(self, x: Tensor, fmt: TensorFormat, outer: Tensor | None) -> Tensor | None:
        """See ``Loops.scales``: of groups in a row, where scales are powers of two, fp32, or small floats."""
        size, numbers = _group(x, fmt.granularity), _scale_numbers(fmt)
        if not size or not numbers or (numbers["IS_NESTED"] and (outer is None or outer.numel() != 1)):
            return None
        x = _readable(x)
        out = torch.empty(fmt.granularity.scale_shape(tuple(x.shape)), dtype=torch.float32, device=x.device)
        outer = out if outer is None else outer.to(x.device, torch.float32)
        launch = {"SIZE": size, "BLOCK": _WIDEST_PIECE, **numbers, **_EXACT_LAUNCH}
        with _on(x.device):
            _kernels().scales_of_groups[_grid(x)](x, out, outer, x.numel(), **launch)
        return out

    def min_max(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """See ``Loops.min_max``."""
        return scaling.min_max(x, granularity)

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.fake_quantize``."""
        x = _readable(x)
        return _round(x, torch.empty_like(x), fmt, (scale, zero_point))

    def codes(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See ``Loops.codes``."""
        x = _readable(x)
        is_signed = isinstance(fmt.element, IntFormat) and fmt.element.is_signed
        out = torch.empty_like(x, dtype=torch.int8 if is_signed else torch.uint8)
        return _round(x, out, fmt, (scale, zero_point))

    def squared_error(self, rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
        """See ``Loops.squared_error``."""
        return scaling.squared_error(rows_NS, scale_N, element)

    def _obstacle(self, device: torch.device) -> str:
        """Why there are no kernels on ``device``; nothing where there are. Found once."""
        if os.environ.get("OCTAVO_COMPILE") == "off":
            return "switched off by OCTAVO_COMPILE"
        if device not in self._obstacles:
            self._obstacles[device] = obstacle = self._tried(device)
            if obstacle:
                logger.warning("rounding on %s has no kernels of its own, with the same results: %s", device, obstacle)
        return self._obstacles[device]

    def _tried(self, device: torch.device) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        try:
            name = first_difference(self, device)
        except Exception as error:  # Triton's own errors, its compiler's, the driver's: all have the same way out
            return f"Triton fails: {type(error).__name__}: {error}".splitlines()[0]
        return f"Triton's code does not round exactly ({name})" if name else ""


@cache
def _kernels() -> Any:
    from octavo.backends import kernels

    return kernels


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _readable(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().contiguous()


def _group(x: Tensor, granularity: Granularity) -> int:
    """Values of a group where groups lie side by side without a rest and fit a kernel; 0 elsewhere."""
    match granularity:
        case PerGroup(size):
            row = x.shape[-1]
        case PerFlatGroup(size):
            row = x.numel()
        case _:
            return 0
    return size if 8 <= size <= _WIDEST_PIECE and not size & (size - 1) and not row % size else 0


def _grid(x: Tensor) -> tuple[int]:
    return (math.ceil(x.numel() / _WIDEST_PIECE),)


@lru_cache(maxsize=64)
def _scale_numbers(fmt: TensorFormat) -> dict[str, Any]:
    """What ``scales_of_groups`` must know of a format; nothing where its scales are of another kind."""
    kernels, of = _kernels(), fmt.scale
    rules = {
        ScaleRule.AMAX: kernels.AMAX,
        ScaleRule.POWER_FLOOR: kernels.POWER_FLOOR,
        ScaleRule.POWER_CEIL: kernels.POWER_CEIL,
    }
    if of is None or fmt.zero_point is not None or fmt.scale_rule not in rules:
        return {}
    is_nested = of.scale == PLAIN_FP32 and of.granularity == PerTensor() and _is_plain_float(of)
    is_power = of.is_plain and of.element == E8M0 and fmt.scale_rule is not ScaleRule.AMAX
    if not (is_nested or is_power or of == PLAIN_FP32):
        return {}
    mantissa, exponent = math.frexp(fmt.top_value)
    found: dict[str, Any] = {
        "RULE": rules[fmt.scale_rule].value,
        "TOP": float(fmt.top_value),
        "TOP_EXPONENT": exponent - 1,
        "TOP_MANTISSA": int((2 * mantissa - 1) * 2**23),
        "MIN_SCALE": float(fmt.min_scale),
        "EMPTY": 1.0 if of.is_plain else 0.0,
        "IS_NESTED": is_nested,
    }
    names = ("LOW", "HIGH", "MIN_NORMAL", "FACTOR")
    inner = _element(of.element, False) if is_nested else dict.fromkeys(names, 1.0)
    smallest = of.element.min_subnormal if isinstance(of.element, FloatFormat) and is_nested else 0.0
    return {**found, "SMALLEST": smallest, **{name: inner[name] for name in names}}


def _is_plain_float(fmt: TensorFormat) -> bool:
    return isinstance(fmt.element, FloatFormat) and is_small(fmt.element) and fmt.is_symmetric and fmt.offset is None


def _round(x: Tensor, out: Tensor, fmt: TensorFormat, by: tuple[Tensor, Tensor | None]) -> Tensor:
    shape = tuple(x.shape)
    expected = fmt.granularity.scale_shape(shape)
    scale, zero = (None if p is None else p.to(x.device, torch.float32).expand(expected).contiguous() for p in by)
    numbers, tables = _element(fmt.element, zero is not None), _tables(fmt.element, x.device)
    blocks = blocks_of(shape, fmt.granularity)
    piece = min(_WIDEST_PIECE, max(16, 1 << (blocks.width - 1).bit_length()))
    grid = (blocks.num_rows, math.ceil(blocks.width / piece))
    with _on(x.device):
        _kernels().round_rows[grid](
            x, out, scale, scale if zero is None else zero, *tables, *_geometry(blocks),
            SIZE=0 if blocks.num_groups == 1 else blocks.size, **numbers,
            AS_CODES=not out.is_floating_point(), BLOCK=piece, **_EXACT_LAUNCH,
        )  # fmt: skip
    return out


def _geometry(blocks: Blocks) -> tuple[int, ...]:
    return blocks.num_values, blocks.width, blocks.matrix_rows, blocks.tile_rows, blocks.num_groups


@lru_cache(maxsize=64)
def _element(element: ElementFormat, has_zero: bool) -> dict[str, Any]:
    """The numbers of a format, under the names of the kernel's parameters."""
    kernels = _kernels()
    found: dict[str, Any] = dict.fromkeys(("UNIT", "MIN_NORMAL", "FACTOR", "SUBNORMALS"), 1.0)
    found |= dict.fromkeys(("SHIFT", "REBIAS", "NAN_CODE", "SIGN_SHIFT", "NUM_VALUES"), 0)
    match element:
        case IntFormat():
            kind = kernels.SHIFTED_INTEGERS if has_zero else kernels.INTEGERS
            found |= {"UNIT": element.unit}
        case FloatFormat():
            kind = kernels.SMALL_FLOATS
            found |= {
                "MIN_NORMAL": 2.0**element.min_exponent,
                "FACTOR": 1.5 * 2.0 ** (23 - element.mantissa_bits),
                "SUBNORMALS": 1 / element.min_subnormal,
                "SHIFT": 23 - element.mantissa_bits,
                "REBIAS": (127 - element.bias) << element.mantissa_bits,
                "NAN_CODE": -1 if element.nan == "none" else (1 << (element.bits - 1)) - 1,
                "SIGN_SHIFT": element.bits - 1,
            }
        case CodebookFormat():
            kind = kernels.CODEBOOK
            found |= {"NUM_VALUES": len(element.values)}
        case _:
            assert_never(element)
    return {**found, "KIND": kind.value, "LOW": float(element.min), "HIGH": float(element.max)}


@lru_cache(maxsize=64)
def _tables(element: ElementFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of a codebook, and what lies between them; of other formats something that is not read."""
    if not isinstance(element, CodebookFormat):
        return (torch.zeros(1, dtype=torch.float32, device=device),) * 2
    values, limits = (
        torch.tensor(v, dtype=torch.float32, device=device) for v in (element.values, thresholds(element))
    )
    return values, limits
