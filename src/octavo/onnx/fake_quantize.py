"""``octavo.FakeQuantize`` inside a graph: what simulation means, before it is spelled in standard operators.

The torch exporter writes one for every quantizer; ``lower`` replaces them all, so no file contains it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import values

import onnx
from octavo.errors import UserError
from octavo.spec.tensor_format import TensorFormat

DOMAIN = "octavo"
NAME = "FakeQuantize"
QUANTIZER = "octavo.quantizer"
"""Metadata of a node: the full name of the quantizer that it stands for."""
ALSO = "octavo.also"
"""Metadata of the same node: names of others, line by line, that round the same tensor alike."""


def _schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    return schema(
        NAME,
        DOMAIN,
        1,
        inputs=[
            schema.FormalParameter("x", "T"),
            schema.FormalParameter("scale", "tensor(float)", param_option=optional),
            schema.FormalParameter("zero_point", "tensor(int32)", param_option=optional),
        ],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[schema.Attribute("format", schema.AttrType.STRING, "")],
    )


_OPERATOR = values.Op(values.Opset(DOMAIN, 1), NAME, _schema())


def fake_quantize(x: Any, scale: Any, zero_point: Any, format: str) -> Any:
    """What ``torch.onnx.export`` calls for ``octavo::fake_quantize``; arguments as there."""
    return _OPERATOR(x, scale, zero_point, format=format)


def is_fake_quantize(node: ir.Node) -> bool:
    """Whether ``node`` is the operator."""
    return node.domain == DOMAIN and node.op_type == NAME


def format_of(node: ir.Node) -> TensorFormat:
    """The format that ``node`` rounds to."""
    return TensorFormat.from_dict(json.loads(node.attributes["format"].as_string()))


def quantizer_of(node: ir.Node) -> str:
    """Full name of the quantizer that ``node`` stands for, its own name where it is not known."""
    return node.metadata_props.get(QUANTIZER) or node.name or node.op_type


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array behind ``value`` when it is an initializer, or one that is only reshaped, transposed or cast."""
    if value is None:
        return None
    if value.const_value is not None and (value.is_initializer() or value.producer() is not None):
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Reshape", "Transpose", "Flatten", "Identity"):
        return None
    source = constant(node.inputs[0])
    return None if source is None else reshaped(source, node)


def reshaped(array: np.ndarray[Any, Any], node: ir.Node) -> np.ndarray[Any, Any] | None:
    """``array`` through a node that moves values without changing any; ``None`` when its target is not constant."""
    match node.op_type:
        case "Identity":
            return array
        case "Transpose":
            return array.transpose(permutation(node, array.ndim))
        case "Flatten":
            axis = node.attributes.get_int("axis", 1) % (array.ndim + 1)
            return array.reshape(int(np.prod(array.shape[:axis])), -1)
        case "Reshape":
            target = constant(node.inputs[1])
            return None if target is None else array.reshape(_target_shape(target, array.shape))
        case _:
            raise UserError(f"node '{node.name}' ({node.op_type}) does not only move values")


def permutation(node: ir.Node, ndim: int) -> tuple[int, ...]:
    """Axes of a Transpose."""
    return tuple(node.attributes.get_ints("perm", tuple(reversed(range(ndim)))))


def _target_shape(target: np.ndarray[Any, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A Reshape's target where 0 keeps an axis."""
    return tuple(shape[axis] if size == 0 else int(size) for axis, size in enumerate(target.tolist()))


def operand(node: ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    """The constant that is a node's input ``index``; ``None`` where there is none."""
    return constant(node.inputs[index]) if len(node.inputs) > index else None
