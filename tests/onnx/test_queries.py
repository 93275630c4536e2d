"""For TensorRT attention's scaling stands in front of the queries' quantizer, and the codes are the same."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import pipeline

pytestmark = pytest.mark.slow
TOKENS = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.is_fused = nn.Linear(48, 144), is_fused

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        if self.is_fused:
            return F.scaled_dot_product_attention(query, key, value)
        probabilities = torch.softmax(query @ key.transpose(-2, -1) / 24**0.5, -1)
        return probabilities @ value


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_queries_are_scaled_before_they_are_quantized(tmp_path: Path, *, is_fused: bool, target: str) -> None:
    run = pipeline.quantize(Attention(is_fused=is_fused).eval(), "fp8-attention", [TOKENS], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=TOKENS)
    nodes = {str(node.name): node for node in ir.load(out / "model.onnx").graph}
    (quantize,) = (node for name, node in nodes.items() if name.endswith("q_bmm_quantizer.quantize"))
    (softmax,) = (node for node in nodes.values() if node.op_type == "Softmax")
    source, scores = (node.inputs[0].producer() for node in (quantize, softmax))  # type: ignore[union-attr]
    is_scaled = source is not None and source.op_type == "Mul"
    assert is_scaled == (target == "tensorrt")
    if is_scaled:
        assert scores is not None
        assert scores.op_type == "MatMul"
        assert scores.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    (graph,) = pipeline.verify(out, run, [TOKENS]).to_json_object()["graphs"]
    assert graph["agrees"], graph
    assert graph["cosine"] == pytest.approx(graph["simulated_cosine"], abs=1e-5)
