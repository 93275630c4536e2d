"""Residual sums in front of norms, written so that onnxruntime leaves the two apart.

It fuses an Add with the LayerNormalization behind it into one SkipLayerNormalization (its optimizer
``skip_layer_norm_fusion.cc``), which on a CPU takes longer than its parts (onnxruntime 1.32; ``python -m
benchmarks.onnx.encoder``). A Sum of two is the same number, and no pattern of it.
"""

from __future__ import annotations

import onnx_ir as ir


def keep_sums_apart(graph: ir.Graph) -> None:
    """Spell every Add of two computed tensors that a LayerNormalization reads as Sum, in place."""
    for node in graph:
        if node.op_type == "Add" and not node.domain and _is_read_by_norm(node) and _is_computed(node):
            node.op_type = "Sum"


def _is_read_by_norm(node: ir.Node) -> bool:
    return any(user.op_type == "LayerNormalization" for user in node.outputs[0].consumers())


def _is_computed(node: ir.Node) -> bool:
    return all(value is not None and value.const_value is None for value in node.inputs)
