"""`octavo verify` runs what was written, says who ran it, and notices a file that means something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from octavo import pipeline


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("recipe", "runtime"),
    [("int8", "onnxruntime"), ("fp8", "onnxruntime"), ("nvfp4-weight-only", "OpenVINO")],
)
def test_files_are_run_by_the_first_reader_that_takes_them(tmp_path: Path, recipe: str, runtime: str) -> None:
    run = pipeline.quantize(model(), recipe, [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    found = pipeline.verify(out, run, [X])
    assert found.agrees, found.to_json_object()
    (graph,) = found.to_json_object()["graphs"]
    assert graph["runtime"].startswith(runtime)
    assert graph["num_weights"] == 2
    assert graph["cosine"] > 0.98


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    run = pipeline.quantize(model(), "int8", [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    graph = ir.load(out / "model.onnx")
    codes = graph.graph.initializers["0.weight_codes"]
    assert codes.const_value is not None
    changed = codes.const_value.numpy().copy()
    changed[3, 4] = -changed[3, 4] - 1
    codes.const_value = ir.Tensor(changed, name=codes.name)
    ir.save(graph, out / "model.onnx")
    found = pipeline.verify(out, run)
    assert not found.agrees
    assert [(d.name, d.num_different) for d in found.weights.differences] == [("0.weight_quantizer", 1)]


def test_a_changed_scale_is_noticed_node_by_node(tmp_path: Path) -> None:
    run = pipeline.quantize(model(), "int8", [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    graph = ir.load(out / "model.onnx")
    scale = graph.graph.initializers["0.input_quantizer_scale"]
    assert scale.const_value is not None
    scale.const_value = ir.Tensor(np.asarray(scale.const_value.numpy() * 1.1, np.float32), name=scale.name)
    ir.save(graph, out / "model.onnx")
    found = pipeline.verify(out, run, [X])
    worst = found.to_json_object()["graphs"][0]["worst_node"]
    assert not found.agrees
    assert worst["quantizer"] == "0.input_quantizer"
    assert worst["share_equal"] < 0.9


def test_a_quantizer_that_no_file_has_is_noticed(tmp_path: Path) -> None:
    run = pipeline.quantize(model(), "int8", [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    graph = ir.load(out / "model.onnx")
    for node in list(graph.graph):
        if (node.name or "").startswith("2.input_quantizer."):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
            graph.graph.remove(node, safe=True)
    ir.save(graph, out / "model.onnx")
    found = pipeline.verify(out, run, [X])
    assert found.to_json_object()["graphs"][0]["lost"] == ("2.input_quantizer",)
    assert not found.agrees


def test_what_onnxruntime_does_not_fuse_is_named(tmp_path: Path) -> None:
    run = pipeline.quantize(model(), "int8", [X], target="onnxruntime-cpu")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    (graph,) = pipeline.verify(out, run, [X]).to_json_object()["graphs"]
    fp8 = pipeline.quantize(model(), "fp8", [X])
    out = pipeline.export(fp8, tmp_path / "fp8", layout="onnx", sample=X)
    (slow,) = pipeline.verify(out, fp8, [X]).to_json_object()["graphs"]
    assert graph["unfused"] == ()
    assert len(slow["unfused"]) == 2
    assert "DequantizeLinear" in slow["kernels"]


def test_inspect_reads_a_graph(tmp_path: Path) -> None:
    from octavo.readers.inspect import inspect

    run = pipeline.quantize(model(), "int8", [X])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=X)
    found = inspect(out / "model.onnx")
    counts = {(row.kind, row.format): (row.num_entries, row.num_values) for row in found.counts}
    assert counts["weight", "int8 per channel"] == (2, 2 * 32 * 64)
    assert counts["activation", "int8 per tensor"] == (2, 0)
    assert not found.concerns
