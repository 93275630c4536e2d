"""NVFP4 activations as TensorRT takes them: one operator of its own, with a body that any reader can run.

``trt.TRT_FP4DynamicQuantize`` (https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/
DynamicQuantize.html) gives codes of E2M1 and, for every 16 of them, a scale in E4M3 that one fp32 scale per tensor
scales; two DequantizeLinear follow. The file says in standard operators what it means, as a function of the model:
TensorRT's parser takes its own operator of that name, everybody else runs the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

import onnx
from octavo.onnx.dynamic import Build
from octavo.onnx.storage import FP4_GROUP
from octavo.spec.element import E2M1, E4M3
from onnx import TensorProto, helper

DOMAIN = "trt"
NAME = "TRT_FP4DynamicQuantize"
OPSET = 23


def is_fp4_blocks(node: ir.Node) -> bool:
    """Whether ``node`` is the operator."""
    return node.domain == DOMAIN and node.op_type == NAME


def fp4_nodes(build: Build, x: ir.Value, scale: float, notes: Mapping[str, str]) -> ir.Value:
    """``x`` rounded to NVFP4 along its last axis, under one fp32 ``scale`` of the scales.

    The operator takes two or three axes; more are made two before it and put back behind.

    Args:
        build: Makes nodes.
        x: What is rounded.
        scale: Of the scales.
        notes: Metadata for the operator.
    """
    shape = x.shape
    assert shape is not None, "the exporter knows how many axes a tensor has"
    width = shape[-1]
    assert isinstance(width, int), "and what a weight's width is"
    is_flat = len(shape) in (2, 3)
    # TensorRT has to know the width before it runs, and behind a Reshape to -1 it does not
    target = [*[0] * (len(shape) - 1), width] if is_flat else [-1, width]
    source = build.op("Reshape", x, build.const(target, "INT64"))
    outer = build.const(scale, "FLOAT")
    where = {"axis": -1, "block_size": FP4_GROUP, "scale_type": int(TensorProto.FLOAT8E4M3FN)}
    codes, scales = build.op(NAME, source, outer, num_outputs=2, domain=DOMAIN, **where)
    codes.producer().metadata_props.update(notes)
    codes.type, scales.type = ir.TensorType(ir.DataType.FLOAT4E2M1), ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    kind = {} if build.dtype is ir.DataType.FLOAT else {"output_dtype": int(build.dtype)}
    steps = build.op("DequantizeLinear", scales, outer, **kind)
    value: ir.Value = build.op("DequantizeLinear", codes, steps, axis=-1, block_size=FP4_GROUP)
    return value if is_flat else build.op("Reshape", value, build.op("Shape", x))


def add_fp4_function(model: ir.Model) -> None:
    """Tell every reader what the operator means."""
    function = fp4_function()
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


def fp4_function() -> ir.Function:
    """What the operator means: ``x`` of any float type and the fp32 scale of scales to codes and scales."""

    def constant(name: str, kind: int, shape: tuple[int, ...], values: list[Any]) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, shape, values))

    def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs.split(), [output], **attributes)

    nodes = [
        constant("blocks", TensorProto.INT64, (2,), [-1, FP4_GROUP]),
        constant("last", TensorProto.INT64, (1,), [-1]),
        constant("top", TensorProto.FLOAT, (), [E2M1.max]),
        constant("smallest", TensorProto.FLOAT, (), [E4M3.min_subnormal]),
        constant("fp8", TensorProto.FLOAT8E4M3FN, (), [0.0]),
        constant("fp4", TensorProto.FLOAT4E2M1, (), [0.0]),
        node("Cast", "x", "wide", to=int(TensorProto.FLOAT)),
        node("Shape", "x", "outside", end=-1),
        node("Concat", "outside blocks", "apart", axis=0),
        node("Reshape", "wide apart", "grouped"),
        node("Abs", "grouped", "size"),
        node("ReduceMax", "size last", "amax", keepdims=0),
        node("Div", "amax top", "step"),
        node("Mul", "outer smallest", "least"),
        node("Max", "step least", "floored"),  # no scale is 0: a block of zeros stays one
        node("QuantizeLinear", "floored outer fp8", "scales"),
        node("DequantizeLinear", "scales outer", "steps"),
        node("QuantizeLinear", "wide steps fp4", "codes", axis=-1, block_size=FP4_GROUP),
    ]
    opsets = [helper.make_opsetid("", OPSET)]
    attributes = ["axis", "block_size", "scale_type"]
    proto = helper.make_function(DOMAIN, NAME, ["x", "outer"], ["codes", "scales"], nodes, opsets, attributes)
    return ir.serde.deserialize_function(proto)
