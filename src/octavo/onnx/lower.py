"""Every ``octavo.FakeQuantize`` of a graph becomes standard operators; the numbers stay the same.

A weight becomes a stored low-precision initializer with only its DequantizeLinear left, in the layout that its
reader wants: what moves the weight's axes on the way (a linear layer's transpose) is applied to the codes. A static
activation becomes QuantizeLinear and DequantizeLinear, a dynamic one the arithmetic that finds its scale and rounds.
What has no standard operator is one of its target's, and its meaning a function of the model (``fp4_blocks.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from octavo.errors import UserError
from octavo.numerics.arrays import tensor_of
from octavo.numerics.qtensor import QTensor, quantize
from octavo.onnx.biases import integer_biases
from octavo.onnx.dynamic import Build, dynamic_nodes
from octavo.onnx.fake_quantize import (
    ALSO,
    DOMAIN,
    QUANTIZER,
    constant,
    format_of,
    is_fake_quantize,
    operand,
    quantizer_of,
)
from octavo.onnx.fp4_blocks import add_fp4_function, fp4_nodes, is_fp4_blocks
from octavo.onnx.queries import FACTOR
from octavo.onnx.storage import BASE_OPSET, code_type, is_float
from octavo.onnx.stored_weights import ScaleCodes, StoredWeight
from octavo.spec.element import BF16, FP16, FP32, IntFormat
from octavo.spec.tensor_format import TensorFormat

WEIGHT = "octavo.weight"
"""Metadata of a DequantizeLinear: whose weight it gives, and ``octavo.axes`` the order of its axes."""
AXES = "octavo.axes"
_NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT4": ml_dtypes.int4,
    "UINT4": ml_dtypes.uint4,
    "INT32": np.int32,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
    "FLOAT8E8M0": ml_dtypes.float8_e8m0fnu,
}
_FLOAT_FORMATS = {ir.DataType.FLOAT: FP32, ir.DataType.FLOAT16: FP16, ir.DataType.BFLOAT16: BF16}


@dataclass(frozen=True, slots=True)
class Style:
    """How one target likes integers spelled; the numbers are the same.

    Args:
        unsigned_activations: Codes of activations as UINT8, 128 higher than the INT8 ones.
        integer_biases: Biases of products of 8-bit integers in INT32 (``biases.py``).
        spells_relu: A ReLU in front of small floats is written as Max, a Clip as Max and Min. onnxruntime (1.32) takes
            a ReLU away that a QuantizeLinear with zero point 0 follows, unless the codes are INT8: right for UINT8,
            wrong for FP8; with a Clip there it does not load the file.
        plain_block_scales: Scales that are codes without a scale (E8M0) as numbers of the float type.
    """

    unsigned_activations: bool = False
    integer_biases: bool = False
    spells_relu: bool = False
    plain_block_scales: bool = False


def lower(model: ir.Model, style: Style, *, opset: int, stored: Mapping[str, QTensor] | None = None) -> None:
    """Replace every ``FakeQuantize`` in ``model``, in place.

    Args:
        model: A graph; weights are initializers.
        style: How the target likes integers.
        opset: Operator set of the result, at least that of the graph.
        stored: Quantizer name -> codes of the weight as they were fixed; others are rounded here.
    """
    graph = model.graph
    writer = _Writer(graph, style, stored or {})
    for node in [node for node in graph if is_fake_quantize(node)]:
        matrix = constant(node.inputs[0])
        if matrix is None:
            writer.activation(node)
        else:
            writer.weight(node, matrix)
    if style.integer_biases:
        integer_biases(graph, writer.initializer)
    model.opset_imports[""] = max(opset, model.opset_imports.get("", BASE_OPSET))
    model.opset_imports.pop(DOMAIN, None)
    if any(map(is_fp4_blocks, graph)):
        add_fp4_function(model)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()


class _Writer:
    """Puts nodes and initializers into one graph."""

    def __init__(self, graph: ir.Graph, style: Style, known: Mapping[str, QTensor]) -> None:
        self.graph = graph
        self.known = known
        self.style = style
        self._stored: dict[tuple[Any, ...], ir.Value] = {}

    def initializer(self, name: str, array: np.ndarray[Any, Any], dtype: str) -> ir.Value:
        """A new initializer; a name that is taken by the same values is used again."""
        unique, count = name, 1
        while unique in self.graph.initializers:
            count += 1
            unique = f"{name}_{count}"
        data = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=ir.DataType[dtype], name=unique)
        value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

    def put(
        self, before: ir.Node, op_type: str, inputs: list[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Node:
        """A new node in front of ``before``; shape and type of its output are those of ``before``'s."""
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = f"{name}_output"
        self.graph.insert_before(before, node)
        return node

    # -- activations

    def activation(self, node: ir.Node) -> None:
        """Round what the graph computes."""
        fmt, scale = format_of(node), operand(node, 1)
        if scale is None:
            replacement = dynamic_nodes(
                self._build(node), node.inputs[0], fmt, is_unsigned=self.style.unsigned_activations
            )
        elif fmt.is_nested:
            notes = {QUANTIZER: quantizer_of(node)} | {k: v for k, v in node.metadata_props.items() if k == ALSO}
            assert node.inputs[0] is not None
            replacement = fp4_nodes(self._build(node), node.inputs[0], float(scale), notes)
        else:
            zero_point = operand(node, 2)
            replacement = self._static(node, fmt, float(scale), 0 if zero_point is None else int(zero_point))
        self._replace(node, replacement)

    def _build(self, node: ir.Node) -> Build:
        prefix = quantizer_of(node)
        source = node.inputs[0]
        dtype = (source.dtype if source is not None else None) or ir.DataType.FLOAT
        counter = iter(range(1 << 20))

        def op(op_type: str, *inputs: Any, **attributes: Any) -> ir.Value:
            name = f"{prefix}.{op_type}_{next(counter)}"
            num_outputs, domain = attributes.pop("num_outputs", 1), attributes.pop("domain", "")
            made = ir.node(op_type, list(inputs), attributes, domain=domain, name=name, num_outputs=num_outputs)
            for index, output in enumerate(made.outputs):
                output.name = f"{name}_output{index}"
            self.graph.insert_before(node, made)
            return made.outputs[0] if num_outputs == 1 else made.outputs  # type: ignore[return-value]

        def const(value: Any, kind: str = "") -> ir.Value:
            kind = kind or dtype.name
            return self.initializer(f"{prefix}.constant", np.asarray(value, dtype=_NUMPY.get(kind, np.int64)), kind)

        return Build(op, const, dtype)

    def _static(self, node: ir.Node, fmt: TensorFormat, scale: float, zero_point: int) -> ir.Value:
        name, x = quantizer_of(node), node.inputs[0]
        assert x is not None
        dtype = (x.dtype or ir.DataType.FLOAT).name
        kind = code_type(fmt.element)
        assert kind is not None
        code_name, low, high = kind.name, None, None
        if isinstance(fmt.element, IntFormat):
            low, high = fmt.element.min_code, fmt.element.max_code
            if self.style.unsigned_activations and code_name == "INT8":
                code_name, zero_point, low, high = "UINT8", zero_point + 128, low + 128, high + 128
        if self.style.spells_relu and is_float(fmt.element):
            x = self._spelled(node, name, x, dtype)
        step = self.initializer(f"{name}_scale", np.asarray(scale, dtype=_NUMPY[dtype]), dtype)
        zero = self.initializer(f"{name}_zero_point", np.asarray(zero_point).astype(_NUMPY[code_name]), code_name)
        if low is not None and high is not None and not _fills(code_name, low, high):
            real = [np.asarray(scale * (code - zero_point), dtype=_NUMPY[dtype]) for code in (low, high)]
            ends = [self.initializer(f"{name}_{end}", v, dtype) for end, v in zip(("low", "high"), real, strict=True)]
            x = self.put(node, "Clip", [x, *ends], f"{name}.clip").outputs[0]
        codes = self.put(node, "QuantizeLinear", [x, step, zero], f"{name}.quantize")
        codes.metadata_props[QUANTIZER] = name
        codes.metadata_props.update({k: v for k, v in node.metadata_props.items() if k in (ALSO, FACTOR)})
        return self.put(node, "DequantizeLinear", [codes.outputs[0], step, zero], f"{name}.dequantize").outputs[0]

    def _spelled(self, node: ir.Node, name: str, x: ir.Value, dtype: str) -> ir.Value:
        """``x`` where a ReLU or a Clip gives it, by Max and Min."""
        maker = x.producer()
        match maker.op_type if maker is not None else "":
            case "Relu":
                lowest = self.initializer(f"{name}_low", np.zeros((), _NUMPY[dtype]), dtype)
                ends: list[tuple[str, ir.Value | None]] = [("Max", lowest)]
            case "Clip":
                ends = list(zip(("Max", "Min"), (maker.inputs[1:] if maker is not None else ()), strict=False))
            case _:
                return x
        assert maker is not None
        value = maker.inputs[0]
        for op_type, end in ends:
            if end is not None:
                value = self.put(node, op_type, [value, end], f"{name}.{op_type.lower()}").outputs[0]
        assert value is not None
        return value

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        old = node.outputs[0]
        value.shape, value.type = old.shape, old.type
        is_output = old.is_graph_output()
        name = old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        if is_output:
            value.name = name

    # -- weights

    def weight(self, node: ir.Node, matrix: np.ndarray[Any, Any]) -> None:
        """Store codes; what only moves their axes behind the quantizer moves them now."""
        fmt, dtype = format_of(node), node.outputs[0].dtype or node.inputs[0].dtype or ir.DataType.FLOAT  # type: ignore[union-attr]
        q = self.known.get(quantizer_of(node))
        stored = StoredWeight.of(_quantized(node, matrix, fmt, dtype) if q is None else q)
        last = node.outputs[0]
        while (follower := _only_reader(last)) is not None:
            moved = stored.through(follower, last)
            if moved is None:
                break
            stored = moved
            if follower.op_type == "Gemm":
                follower.attributes["transB"] = ir.AttrInt64("transB", 0)
                break
            last = follower.outputs[0]
        value = self._dequantized(node, stored, dtype.name)
        value.shape, value.type = ir.Shape(stored.codes.shape), ir.TensorType(dtype)
        last.replace_all_uses_with(value, replace_graph_outputs=True)

    def _dequantized(self, node: ir.Node, stored: StoredWeight, dtype: str) -> ir.Value:
        name = _weight_name(node)
        key = (name, stored.order, str(stored.fmt), dtype)
        if key not in self._stored:
            self._stored[key] = self._store(node, name, stored, dtype)
        return self._stored[key]

    def _store(self, node: ir.Node, name: str, stored: StoredWeight, dtype: str) -> ir.Value:
        kind = code_type(stored.fmt.element)
        assert kind is not None
        codes = self.initializer(f"{name}_codes", _typed(stored.codes, stored.fmt, kind.name), kind.name)
        scale = self._scale(node, name, stored, dtype)
        inputs: list[ir.Value | None] = [codes, scale]
        if not is_float(stored.fmt.element):
            points = np.zeros(stored.scale_shape, np.int8) if stored.zero_point is None else stored.zero_point
            inputs.append(self.initializer(f"{name}_zero_point", points.astype(_NUMPY[kind.name]), kind.name))
        attributes: dict[str, Any] = {}
        if stored.axis is not None:
            attributes["axis"] = stored.axis
        if stored.block:
            attributes["block_size"] = stored.block
        if scale.dtype is ir.DataType.FLOAT8E8M0:
            attributes["output_dtype"] = int(ir.DataType[dtype])
        made = self.put(node, "DequantizeLinear", inputs, f"{name}_dequantize", **attributes)
        made.metadata_props[WEIGHT] = quantizer_of(node)
        made.metadata_props[AXES] = ",".join(map(str, stored.order))
        return made.outputs[0]

    def _scale(self, node: ir.Node, name: str, stored: StoredWeight, dtype: str) -> ir.Value:
        scale = stored.scale
        if not isinstance(scale, ScaleCodes):
            return self.initializer(f"{name}_scale", scale.astype(_NUMPY[dtype]), dtype)
        kind = code_type(scale.fmt.element)
        assert kind is not None
        typed = _typed(scale.codes, scale.fmt, kind.name)
        if scale.outer is None and self.style.plain_block_scales:
            return self.initializer(f"{name}_scale", _as_numbers(name, typed, _NUMPY[dtype]), dtype)
        codes = self.initializer(f"{name}_scale_codes", typed, kind.name)
        if scale.outer is None:
            return codes
        # In fp32: it is small, and fp16 would hold it as a subnormal number.
        outer = self.initializer(f"{name}_scale_scale", scale.outer.astype(np.float32), "FLOAT")
        given = {} if dtype == "FLOAT" else {"output_dtype": int(ir.DataType[dtype])}
        return self.put(node, "DequantizeLinear", [codes, outer], f"{name}_scale_dequantize", **given).outputs[0]


def _quantized(node: ir.Node, matrix: np.ndarray[Any, Any], fmt: TensorFormat, dtype: ir.DataType) -> QTensor:
    """Codes of a constant, with the scale as a graph of ``dtype`` stores it."""
    scale, points = operand(node, 1), operand(node, 2)
    step = None if scale is None else tensor_of(scale).float()
    if step is not None and dtype is not ir.DataType.FLOAT:
        step = step.to(torch.float16 if dtype is ir.DataType.FLOAT16 else torch.bfloat16).float()
    zero = None if points is None else tensor_of(points).to(_zero_dtype(fmt))
    return quantize(tensor_of(matrix).float(), fmt, scale=step, zero_point=zero)


def _zero_dtype(fmt: TensorFormat) -> torch.dtype:
    return torch.int8 if fmt.zero_point is not None and fmt.zero_point.is_signed else torch.uint8


def _typed(codes: np.ndarray[Any, Any], fmt: TensorFormat, kind: str) -> np.ndarray[Any, Any]:
    """Codes under the numpy type of ``kind``: bit patterns of small floats keep their bits."""
    if is_float(fmt.element):
        return np.ascontiguousarray(codes).view(_NUMPY[kind])
    return codes.astype(_NUMPY[kind])


def _as_numbers(name: str, codes: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Powers of two in a float type; one that it lacks is refused."""
    real = codes.astype(np.float32)
    numbers = real.astype(dtype)
    if (numbers.astype(np.float32) != real).any():
        raise UserError(
            f"the scales of '{name}' reach from {real.min():.3g} to {real.max():.3g}, beyond {np.dtype(dtype).name}: "
            "use --float-dtype bfloat16"
        )
    return numbers


def _fills(kind: str, low: int, high: int) -> bool:
    """Whether [low, high] is all that ``kind`` holds, so that it saturates by itself."""
    info = ml_dtypes.iinfo(_NUMPY[kind])
    return bool(low == info.min and high == info.max)


def _only_reader(value: ir.Value) -> ir.Node | None:
    users = value.consumers()
    return users[0] if len(users) == 1 and len(value.uses()) == 1 and not value.is_graph_output() else None


def _weight_name(node: ir.Node) -> str:
    """Name of the initializer that is rounded."""
    value = node.inputs[0]
    while value is not None and not value.is_initializer() and value.producer() is not None:
        producer = value.producer()
        assert producer is not None
        value = producer.inputs[0]
    return value.name if value is not None and value.name else quantizer_of(node)
