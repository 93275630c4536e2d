"""The scaling of attention's scores, moved in front of the queries' quantizer.

TensorRT asks for queries that are scaled before the first product (https://docs.nvidia.com/deeplearning/tensorrt/latest/
inference-library/transformers-fused-attention.html): the product's fp16 output then has the size of what goes into the
softmax, and quantized queries go into the product as they are. Codes stay the same: ``x * c`` is rounded with the scale
``s * c`` where ``x`` was with ``s``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from octavo.onnx.fake_quantize import is_fake_quantize, operand, quantizer_of
from octavo.spec.facts import QUANTIZER_NAMES, Slot

FACTOR = "octavo.factor"
"""Metadata of a quantizer's node: what its input is of the tensor that it was calibrated for."""


def scale_queries(graph: ir.Graph) -> None:
    """Scale what queries' quantizers read instead of what comes out of their products, in place."""
    for node in [node for node in graph if is_fake_quantize(node)]:
        if quantizer_of(node).rpartition(".")[2].endswith(QUANTIZER_NAMES[Slot.QUERY]):
            scaling = _scaling_behind(node)
            if scaling is not None:
                _move(graph, node, scaling)


def _scaling_behind(node: ir.Node) -> ir.Node | None:
    """The Mul or Div by a positive number that alone reads ``node``, or the product that alone reads it."""
    reader = _only_reader(node)
    if reader is not None and reader.op_type == "MatMul":
        reader = _only_reader(reader)
    return reader if reader is not None and (_factor(reader) or 0.0) > 0 else None


def _only_reader(node: ir.Node) -> ir.Node | None:
    value = node.outputs[0]
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _factor(node: ir.Node) -> float | None:
    """The number that a node multiplies by; ``None`` for any other node."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None
    constants = [operand(node, index) for index in (0, 1)]
    number = constants[1] if constants[1] is not None or node.op_type == "Div" else constants[0]
    if number is None or number.size != 1:
        return None
    value = float(number.reshape(()).astype(np.float32))
    return value if node.op_type == "Mul" else 1.0 / value if value else None


def _move(graph: ir.Graph, quantizer: ir.Node, scaling: ir.Node) -> None:
    factor, scale, x = _factor(scaling), operand(quantizer, 1), quantizer.inputs[0]
    scaled = next(value for value in scaling.inputs if value is not None and value.const_value is None)
    assert factor is not None
    if scale is None or operand(quantizer, 2) is not None or x is None or x.dtype is None:
        return
    name = quantizer_of(quantizer)
    number = _constant(graph, f"{name}_factor", np.asarray(factor, x.dtype.numpy()))
    step = _constant(graph, f"{name}_scaled", np.asarray(scale, np.float32) * np.float32(factor))
    before = ir.node("Mul", [x, number], name=f"{name}.scaling")
    before.outputs[0].name = f"{name}.scaling_output"
    before.outputs[0].type, before.outputs[0].shape = x.type, x.shape
    graph.insert_before(quantizer, before)
    quantizer.replace_input_with(0, before.outputs[0])
    quantizer.replace_input_with(1, step)
    quantizer.metadata_props[FACTOR] = repr(factor)
    scaling.outputs[0].replace_all_uses_with(scaled)
    graph.remove(scaling, safe=True)


def _constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
    data = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(data.dtype), const_value=data)
    graph.register_initializer(value)
    return value
