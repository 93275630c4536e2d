"""Biases of products of 8-bit integers in INT32 at the scale of the product, as onnxruntime's integer kernels add them.

A bias moves by at most half of one step of the sum, the product of both operands' scales, which the codes of no output
can show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from octavo.onnx.fake_quantize import operand

Array = np.ndarray[Any, Any]
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_LIMIT = 2**31 - 1


def integer_biases(graph: ir.Graph, initializer: Callable[[str, Array, str], ir.Value]) -> None:
    """Store every such bias of Gemm and Conv as codes with a DequantizeLinear, in place."""
    for node in list(graph):
        if node.op_type not in ("Gemm", "Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias, left, right = operand(node, 2), _scale(node.inputs[0]), _scale(node.inputs[1])
        if bias is None or left is None or right is None or left.size > 1 or bias.ndim != 1:
            continue
        if node.op_type == "Gemm" and (
            node.attributes.get_float("beta", 1.0),
            node.attributes.get_float("alpha", 1.0),
        ) != (1, 1):
            continue
        step = (left.reshape(()) * right).astype(np.float32)
        codes = np.clip(np.rint(bias / step.astype(np.float64)), -_LIMIT, _LIMIT).astype(np.int32)
        name = str(node.inputs[2].name if node.inputs[2] is not None else node.name)
        zero = np.zeros(step.shape, np.int32)
        inputs = [
            initializer(f"{name}_codes", codes, "INT32"),
            initializer(f"{name}_scale", step, "FLOAT"),
            initializer(f"{name}_zero_point", zero, "INT32"),
        ]
        made = ir.node("DequantizeLinear", inputs, {"axis": 0} if step.ndim else {}, name=f"{name}_dequantize")
        made.outputs[0].name = f"{made.name}_output"
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, made)
        node.replace_input_with(2, made.outputs[0])


def _scale(value: ir.Value | None) -> Array | None:
    """The scale of a DequantizeLinear of bytes with one scale, or one for each channel; ``None`` for anything else."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return None
    codes, scale = node.inputs[0], operand(node, 1)
    is_bytes = codes is not None and codes.const_value is not None and codes.const_value.dtype in _BYTES
    source = codes.producer() if codes is not None else None
    if source is not None and source.op_type == "QuantizeLinear":
        zero = source.inputs[2] if len(source.inputs) > 2 else None
        is_bytes = zero is not None and zero.const_value is not None and zero.const_value.dtype in _BYTES
    return scale if is_bytes and scale is not None and scale.dtype == np.float32 and scale.ndim <= 1 else None
