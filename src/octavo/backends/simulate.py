"""The one operator of simulation: ``octavo::fake_quantize``.

An opaque operator with a straight-through gradient: ``torch.compile`` and ``torch.export`` carry it as one node.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from octavo.backends.base import Backend
from octavo.backends.compiled import CompiledBackend
from octavo.backends.gpu import GpuBackend
from octavo.backends.inplace import InPlaceBackend
from octavo.numerics import qtensor
from octavo.numerics.input_rounding import InputRounding
from octavo.numerics.scaling import expand_scale, from_blocks, to_blocks
from octavo.spec.tensor_format import TensorFormat

BACKENDS: tuple[Backend, ...] = (CompiledBackend(), GpuBackend(), InPlaceBackend())
"""Tried in order; what none of them takes is computed by ``numerics``."""

_LIBRARY = torch.library.Library("octavo", "DEF")
_LIBRARY.define("fake_quantize(Tensor x, Tensor? scale, Tensor? zero_point, str format) -> Tensor")


@lru_cache(maxsize=1024)
def format_key(fmt: TensorFormat) -> str:
    """``fmt`` as the text that the operator carries in graphs."""
    return json.dumps(fmt.to_dict(), sort_keys=True)


@lru_cache(maxsize=1024)
def _format(key: str) -> TensorFormat:
    return TensorFormat.from_dict(json.loads(key))


def fake_quantize(x: Tensor, key: str, scale: Tensor | None, zero_point: Tensor | None = None) -> Tensor:
    """Real values to real values on the grid of a format, with a straight-through gradient.

    Args:
        x: Any shape, floating point.
        key: The format, as ``format_key`` gives it.
        scale: Of the outermost level of scales: of ``granularity.scale_shape(x.shape)`` unless the format is nested,
            and then what ``quantize`` calls ``outer_scale``. ``None`` finds it from ``x`` (dynamic).
        zero_point: Integers of the scale's shape, ``None`` when symmetric or dynamic.

    Returns:
        Shape and dtype of ``x``. The gradient is 1 inside the range of the format and 0 outside it
        (arXiv:1308.3432; clipped as in LSQ, arXiv:1902.08153, equation 3).
    """
    out: Tensor = torch.ops.octavo.fake_quantize(x, scale, zero_point, key)
    return out


def round_inputs(rows: Tensor, rounding: InputRounding) -> Tensor:
    """``(num_rows, in_features)`` inputs of a layer as its quantizer will make them, fp32."""
    return fake_quantize(rows.float(), format_key(rounding.format), rounding.scale, rounding.zero_point)


def _compute(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: str) -> Tensor:
    """The operator itself. Always contiguous, as graphs are told: backends differ in what they make of strides."""
    return _fastest(x, scale, zero_point, format).contiguous()


def _fastest(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: str) -> Tensor:
    fmt = _format(format)
    return qtensor.fake_quantize(x, fmt, outer_scale=scale, zero_point=zero_point, loops=loops_for(x, fmt))


def loops_for(x: Tensor, fmt: TensorFormat) -> Backend | None:
    """The first backend that takes ``x`` in ``fmt``; ``None``: ``numerics`` alone."""
    return next((backend for backend in BACKENDS if backend.supports(x, fmt).ok), None)


def range_of(x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """Scale as stored and zero point (``None`` when symmetric) that cover all of ``x``, of the format's scale shape."""
    return qtensor.stored_scale(x, fmt, loops=loops_for(x, fmt))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, key = inputs
    ctx.format = key
    ctx.is_static = scale is not None and not _format(key).is_nested  # groups follow their values: nothing is clipped
    if ctx.is_static:
        ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
    if not ctx.is_static:
        return grad, None, None, None
    x, scale, zero_point = ctx.saved_tensors
    fmt, shape = _format(ctx.format), tuple(x.shape)
    values = to_blocks(x.float(), fmt.granularity)[0] / expand_scale(scale, fmt.granularity, shape)
    if zero_point is not None:
        values = values + expand_scale(zero_point.float(), fmt.granularity, shape)
    inside = (values >= fmt.element.min) & (values <= fmt.element.max)
    return grad * from_blocks(inside, fmt.granularity, shape), None, None, None


_LIBRARY.impl("fake_quantize", _compute, "CompositeExplicitAutograd")
torch.library.register_fake(
    "octavo::fake_quantize",
    lambda x, scale, zero_point, format: torch.empty_like(x, memory_format=torch.contiguous_format),
)
torch.library.register_autograd("octavo::fake_quantize", _backward, setup_context=_setup_context)

OPERATOR = torch.ops.octavo.fake_quantize.default
"""What graphs of ``torch.export`` call; a translation to another representation is keyed by it."""
