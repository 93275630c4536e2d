"""Activations whose range is found per call, in standard operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from octavo.onnx.storage import code_type
from octavo.spec.element import IntFormat
from octavo.spec.tensor_format import PerToken, TensorFormat


@dataclass(frozen=True, slots=True)
class Build:
    """Makes nodes where a quantizer was: ``op(type, *inputs, **attributes)`` and ``const(value, type name)``.

    ``dtype`` is the type of what is rounded.
    """

    op: Callable[..., Any]
    const: Callable[..., ir.Value]
    dtype: ir.DataType


def dynamic_nodes(build: Build, x: ir.Value | None, fmt: TensorFormat, *, is_unsigned: bool) -> ir.Value:
    """``x`` rounded with a scale found from itself, per tensor or per token.

    An asymmetric 8-bit tensor becomes DynamicQuantizeLinear, whose arithmetic is that of the format; all else is
    spelled out: scale = amax / largest value (1 where all is 0), then division, rounding, and multiplication.
    """
    element = fmt.element
    if isinstance(element, IntFormat) and element.bits == 8 and not fmt.is_symmetric and not _is_per_token(fmt):
        is_wide = build.dtype is ir.DataType.FLOAT
        wide = x if is_wide else build.op("Cast", x, to=int(ir.DataType.FLOAT))  # the operator has no other type
        codes, scale, zero = build.op("DynamicQuantizeLinear", wide, num_outputs=3)
        value: ir.Value = build.op("DequantizeLinear", codes, scale, zero)
        return value if is_wide else build.op("Cast", value, to=int(build.dtype))
    scale = _scale(build, x, fmt) if fmt.is_symmetric else None
    if scale is None:
        return _asymmetric(build, x, fmt)
    scaled = build.op("Div", x, scale)
    if isinstance(element, IntFormat):
        rounded = build.op("Round", scaled)
        rounded = build.op("Clip", rounded, build.const(element.min_code), build.const(element.max_code))
    else:
        kind = code_type(element)
        assert kind is not None
        one, zero = build.const(1.0), build.const(0.0, kind.name)
        rounded = build.op("DequantizeLinear", build.op("QuantizeLinear", scaled, one, zero), one, zero)
    result: ir.Value = build.op("Mul", rounded, scale)
    return result


def _is_per_token(fmt: TensorFormat) -> bool:
    return isinstance(fmt.granularity, PerToken)


def _reduce(build: Build, op_type: str, x: Any, fmt: TensorFormat) -> Any:
    axes = [build.const([-1], "INT64")] if _is_per_token(fmt) else []
    return build.op(op_type, x, *axes, keepdims=1)


def _scale(build: Build, x: Any, fmt: TensorFormat) -> Any:
    amax = _reduce(build, "ReduceMax", build.op("Abs", x), fmt)
    return _or_one(build, build.op("Div", amax, build.const(fmt.element.max)))


def _or_one(build: Build, scale: Any) -> Any:
    return build.op("Where", build.op("Equal", scale, build.const(0.0)), build.const(1.0), scale)


def _asymmetric(build: Build, x: Any, fmt: TensorFormat) -> ir.Value:
    """As ``numerics.scaling.scale_from_range``."""
    element = fmt.element
    assert isinstance(element, IntFormat)
    nothing = build.const(0.0)
    low = build.op("Min", _reduce(build, "ReduceMin", x, fmt), nothing)
    high = build.op("Max", _reduce(build, "ReduceMax", x, fmt), nothing)
    span = build.const((element.max_code - element.min_code) / 2)
    half = build.const(2.0)
    scale = _or_one(
        build, build.op("Div", build.op("Sub", build.op("Div", high, half), build.op("Div", low, half)), span)
    )
    ends = build.const(element.min_code), build.const(element.max_code)
    zero = build.op("Sub", ends[0], build.op("Round", build.op("Div", low, scale)))
    zero = build.op("Clip", zero, *ends)
    codes = build.op("Clip", build.op("Add", build.op("Round", build.op("Div", x, scale)), zero), *ends)
    result: ir.Value = build.op("Mul", build.op("Sub", codes, zero), scale)
    return result
