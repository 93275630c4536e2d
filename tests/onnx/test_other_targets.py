"""A run made for one target is written for another only where it means the same there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo import pipeline
from octavo.errors import UserError


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


ROWS, PICTURES, TOKENS = torch.randn(4, 64), torch.randn(2, 3, 8, 8), torch.randn(2, 8, 16)


@pytest.mark.parametrize(
    ("build", "x", "recipe", "made", "wanted", "why"),
    [
        (linear, ROWS, "int8", "tensorrt", "onnxruntime-cpu", "int8-channel, and onnxruntime-cpu wants int7"),
        (linear, ROWS, "int8", "tensorrt", "openvino", "int8-channel, and openvino wants int7"),
        (linear, ROWS, "int8", "onnxruntime-cpu", "tensorrt", "int8-tensor-asymmetric, and tensorrt wants int8-tensor"),
        (linear, ROWS, "int8", "openvino", "tensorrt", "int8-tensor-asymmetric, and tensorrt wants int8-tensor"),
        (Conv, PICTURES, "int8", "openvino", "onnxruntime-cpu", "'conv.output_quantizer' is not there"),
        (linear, ROWS, "int8", "onnxruntime-cpu-avx2", "onnxruntime-cpu-vnni", "saturate on one of the two"),
        (Attention, TOKENS, "fp8-attention", "openvino", "tensorrt", "softmax_quantizer' is not there"),
    ],
)
def test_another_meaning_is_refused_with_the_command_that_fits(
    tmp_path: Path, build: type[nn.Module], x: torch.Tensor, recipe: str, made: str, wanted: str, why: str
) -> None:
    run = pipeline.quantize(build().eval(), recipe, [x], target=made)
    with pytest.raises(UserError) as caught:
        pipeline.export(run, tmp_path / "onnx", layout="onnx", target=wanted, sample=x)
    said = str(caught.value)
    assert re.match(rf"this run was made for {made}: .*{re.escape(why)}", said), said
    assert f"--recipe {recipe} --target {wanted} --layout onnx" in said
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "made", "wanted"),
    [
        ("int8-weight-only", "tensorrt", "onnxruntime-cpu"),
        ("int8", "onnxruntime-cpu", "openvino"),
        ("fp8", "openvino", "tensorrt"),
    ],
)
def test_what_means_the_same_is_written(tmp_path: Path, recipe: str, made: str, wanted: str) -> None:
    run = pipeline.quantize(linear(), recipe, [ROWS], target=made)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", target=wanted, sample=ROWS)
    assert pipeline.verify(out, run, [ROWS]).agrees
