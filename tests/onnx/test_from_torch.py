"""A simulated torch model and its graph compute the same, for every size that the graph leaves open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from octavo import pipeline
from octavo.errors import UserError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(torch.relu(self.conv(pixel_values))))
        out: torch.Tensor = self.head(hidden.mean((2, 3)))
        return out


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("target", ["", "onnxruntime-cpu", "tensorrt"])
def test_a_module_runs_in_onnxruntime_as_it_was_simulated(tmp_path: Path, target: str) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    run = pipeline.quantize(Small(), "int8", [x], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x)
    more = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    (found,) = session(out / "model.onnx").run(None, {"pixel_values": more.numpy()})
    with torch.no_grad():
        assert np.allclose(found, run.model(more).numpy(), atol=2e-2)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(a) - b
        return out


def test_one_tensor_for_two_inputs_stays_two_inputs(tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    run = pipeline.quantize(Two(), "int8-weight-only", sample=(x, x))
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=(x, x))
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    (found,) = session(out / "model.onnx").run(None, {"a": a.numpy(), "b": b.numpy()})
    with torch.no_grad():
        assert np.allclose(found, run.model(a, b).numpy(), atol=1e-5)


def test_a_run_for_one_target_is_refused_for_another(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    run = pipeline.quantize(Small(), "int8", [x], target="onnxruntime-cpu")
    with pytest.raises(UserError, match=r"made for onnxruntime-cpu: .* tensorrt wants .*--target tensorrt"):
        pipeline.export(run, tmp_path / "onnx", layout="onnx", target="tensorrt", sample=x)
    assert not (tmp_path / "onnx").exists()


def test_a_directory_that_octavo_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("precious")
    x = torch.randn(2, 3, 8, 8)
    run = pipeline.quantize(Small(), "int8-weight-only")
    with pytest.raises(UserError, match="something else"):
        pipeline.export(run, tmp_path / "mine", layout="onnx", sample=x)
    assert (tmp_path / "mine" / "model.onnx").read_text() == "precious"


def test_a_format_without_standard_operators_is_refused_before_calibration() -> None:
    from octavo.spec.recipe import read_recipe

    recipe = read_recipe("rules: [{select: 'operation:linear', scheme: {input: int8-group32}}]", "r.yaml")
    with pytest.raises(UserError, match=r"layout 'onnx' cannot hold this plan:\n.*no standard operator"):
        pipeline.quantize(nn.Linear(64, 64), recipe, [torch.ones(2, 64)], layouts=["onnx"])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_onnxruntime_keeps_a_relu_in_front_of_fp8(activation: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = 8 * torch.randn(64, 32)
    run = pipeline.quantize(nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 8)), "fp8", [x])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x)
    (found,) = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"input": x.numpy()})
    with torch.no_grad():
        assert np.allclose(found, run.model(x).numpy(), atol=2e-2)
    assert pipeline.verify(out, run, [x]).agrees
