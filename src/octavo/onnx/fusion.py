"""What onnxruntime makes of a graph: the kernels after fusion, and the products that still compute in float."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

import onnx

_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "FusedConv", "FusedGemm"))


@dataclass(frozen=True, slots=True)
class Fusion:
    """One graph on one machine.

    Args:
        kernels: Operator -> how many run.
        unfused: Names of products whose inputs are dequantized first, so that they compute in float.
    """

    kernels: dict[str, int]
    unfused: tuple[str, ...]


def fusion_of(path: Path) -> Fusion:
    """Optimize the graph ``path`` as onnxruntime does on this machine, and look at what became of it."""
    with tempfile.TemporaryDirectory(prefix="octavo-fusion-") as place:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(place, "optimized.onnx"))
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(Path(place, "optimized.onnx"), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants}
    unfused = [n.name for n in graph.node if n.op_type in _PRODUCTS and dequantized.intersection(n.input)]
    return Fusion(dict(Counter(node.op_type for node in graph.node).most_common()), tuple(sorted(unfused)))
