"""Weights that a protobuf cannot hold lie in a file beside the graph, when written and when read.

The limit is put to a few bytes here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import onnx
from octavo import pipeline
from octavo.errors import UserError
from octavo.onnx import write
from octavo.readers.inspect import inspect
from octavo.sources import open_model
from onnx import TensorProto, helper

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "MAX_INLINE_BYTES", 1000)


def graph_with_weights_beside_it(directory: Path) -> Path:
    """x -> MatMul -> ReduceMean -> Add; in operator set 13, where ReduceMean has its axes as an attribute."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 128)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"], name="/first/MatMul"),
        helper.make_node("ReduceMean", ["h"], ["m"], axes=[-1], keepdims=1),
        helper.make_node("Sub", ["h", "m"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 128])],
        [helper.make_tensor("first.weight", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = directory / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.weights", size_threshold=0)
    return path


@pytest.mark.parametrize("recipe", ["int8", "nvfp4-weight-only"])
def test_a_model_becomes_a_graph_and_a_file_of_weights(recipe: str, tmp_path: Path, small_limit: None) -> None:
    torch.manual_seed(0)
    run = pipeline.quantize(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), recipe, [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    assert {file.name for file in out.glob("model*")} == {"model.onnx", "model.onnx.data"}
    assert (out / "model.onnx").stat().st_size < (out / "model.onnx.data").stat().st_size
    found = pipeline.verify(out, run, [X])
    assert found.agrees, found.to_json_object()
    weights = [row for row in inspect(out / "model.onnx").counts if row.kind == "weight"]
    assert (2, 2 * 64 * 128) in [(row.num_entries, row.num_values) for row in weights]


def test_a_graph_with_weights_beside_it_goes_all_the_way(tmp_path: Path, small_limit: None) -> None:
    path = graph_with_weights_beside_it(tmp_path)
    data = [{"x": X}]
    loaded = open_model(path)
    run = pipeline.save(pipeline.quantize(loaded, "int8", data), tmp_path / "run")
    again = pipeline.load(tmp_path / "run")
    assert torch.equal(again.door.run(data[0])["y"], run.door.run(data[0])["y"])
    out = pipeline.export(tmp_path / "run", tmp_path / "onnx", layout="onnx")
    assert pipeline.verify(out, again, data).agrees
    pipeline.export_graph(run, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx.data").is_file()
    assert open_model(tmp_path / "q.onnx").model(X)["y"].shape == (8, 128)
    assert ir.load(tmp_path / "q.onnx").opset_imports[""] == 21


def test_weights_beside_a_graph_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = graph_with_weights_beside_it(tmp_path)
    run = pipeline.quantize(open_model(path), "int8", [{"x": X}])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx")
    assert pipeline.verify(out, run, [{"x": X}]).agrees


def test_missing_weights_are_told_with_the_file(tmp_path: Path) -> None:
    path = graph_with_weights_beside_it(tmp_path)
    (tmp_path / "model.weights").unlink()
    with pytest.raises(UserError, match=r"model\.weights"):
        pipeline.plan(open_model(path), "int8")
