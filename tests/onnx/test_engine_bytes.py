"""What the weights of an engine of TensorRT have less than those of the one in fp16 is what the plan says."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from benchmarks.onnx import engines

from octavo import pipeline
from octavo.onnx.engine import judge
from octavo.onnx.lower import WEIGHT
from octavo.onnx.tensorrt import is_installed, serialized

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="needs the extra 'tensorrt'")]
BLACKWELL = "Blackwell (SM120)"


def test_saved_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    rows = list(engines.measure("two-layers", ["fp8", "int4-group"], BLACKWELL, tmp_path))
    assert len(rows) == 2
    for row in rows:
        assert row.fp16.weight_bytes > 20e6
        assert not row.engine.wide_weights
        assert abs(row.weights_off) < 0.02  # scales of groups are fp16 there, and fp32 in the account
        assert abs(row.engines_off) < 0.1


def test_in_narrow_layers_kernels_hide_it_and_weights_show_it(tmp_path: Path) -> None:
    (row,) = engines.measure("vit-small", ["fp8"], BLACKWELL, tmp_path)
    assert row.fp16.weight_bytes > 20e6
    assert abs(row.weights_off) < 0.02 < abs(row.engines_off)


def test_the_count_is_of_bytes_that_are_in_the_engine(tmp_path: Path) -> None:
    x = torch.randn(8, 256)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).eval()
    run = pipeline.quantize(model, "fp8", [x], target="tensorrt")
    path = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=torch.float16) / "model.onnx"
    messages: list[str] = []
    engine = serialized(path, {"input": ((1, 256), (8, 256))}, "SM120", messages)
    assert engine is not None, messages[-1]
    graph = ir.load(path).graph
    codes = [node.inputs[0] for node in graph if WEIGHT in node.metadata_props]
    stored = [value.const_value.tobytes() for value in codes if value is not None and value.const_value is not None]
    assert len(stored) == 2
    assert all(weight in bytes(engine) for weight in stored)
    said = judge(graph, engine.nbytes, messages)
    assert sum(map(len, stored)) < said.weight_bytes < 1.05 * said.file_bytes < engine.nbytes
