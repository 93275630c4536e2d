"""TensorRT parses what is written for it, and builds engines, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from octavo import pipeline
from octavo.onnx.tensorrt import ARCHITECTURES, is_installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="needs the extra 'tensorrt'")]


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-weight-only", "int4-group"])
def test_files_for_tensorrt_become_engines(tmp_path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 128)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    run = pipeline.quantize(model, recipe, [x], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x)
    (graph,) = pipeline.verify(out, run, [x]).to_json_object()["graphs"]
    assert graph["agrees"], graph
    assert set(graph["engines"]) == set(ARCHITECTURES)


def test_what_tensorrt_refuses_is_said(tmp_path: Path) -> None:
    from octavo.onnx.tensorrt import build_engines

    x = torch.randn(8, 128)
    run = pipeline.quantize(nn.Linear(128, 64), "int8", [x], target="openvino")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x)
    built = build_engines(out / "model.onnx", {"input": (8, 128)})
    assert all("zero point" in str(why) for why in built.values())
