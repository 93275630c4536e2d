"""Small graphs with ``octavo.FakeQuantize`` in them, as the torch exporter would write them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir

from octavo.spec.tensor_format import TensorFormat


def initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    data = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
    graph.register_initializer(value)
    return value


def empty(*inputs: tuple[str, list[Any]]) -> ir.Model:
    values = [ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT)) for n, s in inputs]
    return ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21, "octavo": 1}, name="g"), ir_version=11)


def add(graph: ir.Graph, op_type: str, *inputs: Any, domain: str = "", **attributes: Any) -> ir.Value:
    node = ir.node(op_type, list(inputs), attributes, domain=domain, name=f"{op_type}_{len(graph)}")
    node.outputs[0].name = f"{node.name}_y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    return node.outputs[0]


def fake(graph: ir.Graph, x: Any, fmt: TensorFormat, scale: Any = None, zero_point: Any = None) -> ir.Value:
    return add(graph, "FakeQuantize", x, scale, zero_point, domain="octavo", format=json.dumps(fmt.to_dict()))


def finish(model: ir.Model, value: ir.Value) -> ir.Model:
    value.shape = None
    model.graph.outputs.append(value)
    return model
