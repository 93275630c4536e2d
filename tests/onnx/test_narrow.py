"""A graph's float parts in fp16 or bf16: the file means what was simulated in fp32, to that type's precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from hand_made_graphs import add, empty, finish, initializer
from octavo import pipeline
from octavo.errors import UserError
from octavo.onnx.narrow import narrow
from octavo.sources import open_model

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 32)).eval()
    path: Path = tmp_path_factory.mktemp("narrow") / "net.onnx"
    program = torch.onnx.export(net, (X,), input_names=["x"], dynamo=True, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(path)
    return path


def kinds(path: Path) -> set[str]:
    values = ir.load(path).graph.initializers.values()
    return {value.const_value.dtype.name for value in values if value.const_value is not None}


@pytest.mark.parametrize(
    ("recipe", "target", "dtype", "runtime"),
    [
        ("int8", "onnxruntime-cpu", torch.float16, "onnxruntime"),
        ("int8-dynamic", "onnxruntime-cpu", torch.float16, "onnxruntime"),
        ("fp8", "", torch.float16, "onnxruntime"),
        ("fp8", "", torch.bfloat16, ""),
        ("int4-group32", "", torch.bfloat16, ""),
    ],
)
def test_the_file_means_what_was_simulated(
    file: Path, tmp_path: Path, recipe: str, target: str, dtype: torch.dtype, runtime: str
) -> None:
    run = pipeline.quantize(open_model(file), recipe, [{"x": X}], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", dtype=dtype)
    found = pipeline.verify(out, run, [{"x": X}]).to_json_object()
    assert found["agrees"], found
    assert found["graphs"][0]["runtime"].startswith(runtime)
    assert "FLOAT" not in kinds(out / "model.onnx") - {"FLOAT16"}
    graph = ir.load(out / "model.onnx").graph
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.from_numpy(_NUMPY[dtype])}


_NUMPY = {torch.float16: np.dtype("float16"), torch.bfloat16: ir.DataType.BFLOAT16.numpy()}


def positions() -> ir.Model:
    """x + sin(position * frequency) masked by -3e38, both of integers alone."""
    model = empty(("x", ["n", 4]))
    graph = model.graph
    place = ir.Value(name="place", shape=ir.Shape(["n", 1]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(place)
    wide = add(graph, "Cast", place, to=int(ir.DataType.FLOAT))
    angle = add(graph, "Mul", wide, initializer(graph, "frequency", np.array([[1, 0.1, 0.01, 0.001]], np.float32)))
    mask = add(graph, "Mul", add(graph, "Sub", wide, wide), initializer(graph, "lowest", np.float32(-3e38)))
    low = add(graph, "Add", mask, initializer(graph, "far", np.float32(-3e38)))
    table = add(graph, "MatMul", graph.inputs[0], initializer(graph, "w", np.eye(4, dtype=np.float32)))
    return finish(model, add(graph, "Max", add(graph, "Add", table, add(graph, "Sin", angle)), low))


def test_what_follows_from_integers_stays_wide_and_nothing_becomes_infinite() -> None:
    model = positions()
    place = np.array([[4097], [30011]], np.int64)
    x = np.zeros((2, 4), np.float16)
    made = narrow(model, ir.DataType.FLOAT16)
    made.opset_imports.pop("octavo")
    (found,) = ReferenceEvaluator(ir.to_proto(made)).run(None, {"x": x, "place": place})
    assert found.dtype == np.float16
    assert np.isfinite(found).all()
    assert np.allclose(found, np.sin(place * np.array([[1, 0.1, 0.01, 0.001]])), atol=4e-3)
    assert set(made.graph.initializers) >= {"w", "frequency", "far"}


def test_an_operator_without_the_type_keeps_its_own() -> None:
    model = empty(("x", [1, 1, 4, 4]))
    graph = model.graph
    scales = initializer(graph, "scales", np.array([1, 1, 2, 2], np.float32))
    doubled = add(graph, "Resize", graph.inputs[0], None, scales, mode="nearest")
    made = narrow(finish(model, add(graph, "Relu", doubled)), ir.DataType.BFLOAT16)
    assert made.graph.initializers["scales"].dtype is ir.DataType.FLOAT
    assert made.graph.outputs[0].dtype is ir.DataType.BFLOAT16


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    model = empty(("x", [2, 2]))
    inner = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="inner")
    inner.outputs.append(add(inner, "Identity", model.graph.inputs[0]))
    model.graph.append(ir.Node("", "If", [model.graph.inputs[0]], [ir.AttrGraph("then_branch", inner)], name="if"))
    with pytest.raises(UserError, match="has control flow, whose branches keep their types"):
        narrow(model, ir.DataType.FLOAT16)
    half = empty(("x", [2, 2]))
    initializer(half.graph, "w", np.eye(2, dtype=np.float16))
    with pytest.raises(UserError, match="is in float16 and is not made wider"):
        narrow(half, ir.DataType.FLOAT)
