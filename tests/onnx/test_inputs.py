"""What graphs from files may hold: shared weights, attention as one operator or three, somebody else's quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hand_made_graphs import add, empty, finish, initializer
from octavo import pipeline
from octavo.errors import UserError
from octavo.sources import open_model
from octavo.spec.facts import Slot
from octavo.spec.recipe import read_recipe

RNG = np.random.default_rng(0)
X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
DATA = [{"x": X}]


def weight(graph: ir.Graph, name: str, rows: int = 32, columns: int = 32) -> ir.Value:
    return initializer(graph, f"{name}.weight", (RNG.standard_normal((rows, columns)) / 6).astype(np.float32))


def written(model: ir.Model, value: ir.Value, path: Path, opset: int = 21) -> Path:
    finish(model, value)
    model.opset_imports.pop("octavo")
    model.opset_imports[""] = opset
    ir.save(model, path)
    return path


def check(path: Path, recipe: str, tmp_path: Path, target: str = "onnxruntime-cpu") -> pipeline.Run:
    """Quantize, write, and hold the file against the simulation."""
    run = pipeline.quantize(open_model(path), recipe, DATA, target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx")
    found = pipeline.verify(out, run, DATA)
    assert found.agrees, found.to_json_object()
    return run


def sites(run: pipeline.Run) -> dict[str, Any]:
    return {decision.site.name: decision for decision in run.plan.decisions}


def test_a_weight_that_two_products_read_is_stored_once(tmp_path: Path) -> None:
    model = empty(("x", ["n", 6, 32]))
    shared = weight(model.graph, "both")
    first = add(model.graph, "Relu", add(model.graph, "MatMul", model.graph.inputs[0], shared))
    path = written(model, add(model.graph, "MatMul", first, shared), tmp_path / "g.onnx")
    run = check(path, "int8", tmp_path)
    decisions = sites(run)
    assert decisions["both#1"].site.tied_to == "both"
    assert run.plan.facts.num_parameters == 32 * 32
    stored = [
        v for v in ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers.values() if v.name.endswith("_codes")
    ]
    assert [value.name for value in stored] == ["both.weight_codes"]


def test_a_table_that_is_read_as_a_head_too_is_stored_once(tmp_path: Path) -> None:
    """Gather of rows and a Gemm with the same rows, as language models tie them."""
    model = empty()
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(ids)
    table = weight(model.graph, "embed", 50)
    path = written(
        model, add(model.graph, "Gemm", add(model.graph, "Gather", table, ids), table, transB=1), tmp_path / "g.onnx"
    )
    data = [{"ids": torch.arange(20)}]
    recipe = "rules: [{select: ['operation:embedding', 'operation:linear'], scheme: {weight: int8-channel}}]"
    run = pipeline.quantize(open_model(path), read_recipe(recipe, "r.yaml"), data)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx")
    assert pipeline.verify(out, run, data).agrees
    kinds = [v.dtype.name for v in ir.load(out / "model.onnx").graph.initializers.values() if v.dtype is not None]
    assert kinds.count("INT8") <= 2  # codes, and zero points
    assert run.plan.facts.num_parameters == 50 * 32


def attention(path: Path, *, is_one: bool) -> Path:
    model = empty(("x", ["n", 6, 32]))
    graph, x = model.graph, model.graph.inputs[0]
    q, k, v = (add(graph, "MatMul", x, weight(graph, part)) for part in "qkv")
    if is_one:
        mixed = add(graph, "Attention", q, k, v, q_num_heads=2, kv_num_heads=2)
        return written(model, add(graph, "MatMul", mixed, weight(graph, "out")), path, opset=23)
    shape = initializer(graph, "heads", np.array([0, 0, 2, 16]))
    heads = [add(graph, "Transpose", add(graph, "Reshape", t, shape), perm=[0, 2, 1, 3]) for t in (q, k, v)]
    scores = add(graph, "MatMul", heads[0], add(graph, "Transpose", heads[1], perm=[0, 1, 3, 2]))
    probabilities = add(graph, "Softmax", add(graph, "Mul", scores, initializer(graph, "s", np.float32(0.25))), axis=-1)
    mixed = add(graph, "Transpose", add(graph, "MatMul", probabilities, heads[2]), perm=[0, 2, 1, 3])
    mixed = add(graph, "Reshape", mixed, initializer(graph, "flat", np.array([0, 0, 32])))
    return written(model, add(graph, "MatMul", mixed, weight(graph, "out")), path)


@pytest.mark.parametrize("is_one", [True, False])
def test_attention_has_its_quantizers_in_either_spelling(is_one: bool, tmp_path: Path) -> None:
    path = attention(tmp_path / "g.onnx", is_one=is_one)
    run = check(path, "fp8-attention", tmp_path, target="")
    (found,) = [decision for decision in run.plan.decisions if decision.site.operation == "attention"]
    assert {Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.ATTENTION_OUTPUT} <= set(found.scheme)
    assert (Slot.SOFTMAX in found.site.slots) is not is_one
    file = ir.load(tmp_path / "onnx" / "model.onnx").graph
    kind = "Attention" if is_one else "Softmax"
    assert any(node.op_type == kind for node in file)


def quantized_by_others(path: Path, *, weights: bool) -> Path:
    """Two products; somebody quantized the first one's weight, or its input."""
    model = empty(("x", ["n", 6, 32]))
    graph, x = model.graph, model.graph.inputs[0]
    step = initializer(graph, "step", np.float32(0.05))
    if weights:
        codes = initializer(graph, "codes", RNG.integers(-99, 99, (32, 32)).astype(np.int8))
        first = add(graph, "MatMul", x, add(graph, "DequantizeLinear", codes, step))
    else:
        zero = initializer(graph, "zero", np.int8(0))
        codes = add(graph, "QuantizeLinear", x, step, zero)
        codes.type = ir.TensorType(ir.DataType.INT8)
        rounded = add(graph, "DequantizeLinear", codes, step, zero)
        first = add(graph, "MatMul", rounded, weight(graph, "first"))
    return written(model, add(graph, "MatMul", add(graph, "Relu", first), weight(graph, "second")), path)


@pytest.mark.parametrize("weights", [True, False])
def test_what_others_quantized_is_kept_with_the_reason(weights: bool, tmp_path: Path) -> None:
    path = quantized_by_others(tmp_path / "g.onnx", weights=weights)
    run = check(path, "int8", tmp_path)
    decisions = sites(run)
    (kept,) = [d for d in decisions.values() if "quantized in the file already: kept as it is" in d.why]
    assert kept.site.obstacle.startswith("its weight is" if weights else "its input is")
    assert not kept.scheme
    assert Slot.WEIGHT in decisions["second"].scheme


def test_a_file_of_octavos_own_is_not_quantized_twice(tmp_path: Path) -> None:
    path = attention(tmp_path / "g.onnx", is_one=False)
    pipeline.export_graph(pipeline.quantize(open_model(path), "int8", DATA), tmp_path / "q.onnx")
    with pytest.raises(UserError, match="quantized in the file already: kept as it is"):
        pipeline.quantize(open_model(tmp_path / "q.onnx"), "int8", DATA)


def test_integer_operators_are_kept_with_the_reason(tmp_path: Path) -> None:
    model = empty(("x", ["n", 6, 32]))
    graph, x = model.graph, model.graph.inputs[0]
    made = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name="dynamic")
    for index, output in enumerate(made.outputs):
        output.name = f"dynamic_{index}"
    graph.append(made)
    codes = initializer(graph, "codes", RNG.integers(-99, 99, (32, 32)).astype(np.int8))
    sums = add(graph, "MatMulInteger", made.outputs[0], codes, made.outputs[2])
    sums.type = ir.TensorType(ir.DataType.INT32)
    real = add(graph, "Mul", add(graph, "Cast", sums, to=1), made.outputs[1])
    path = written(model, add(graph, "MatMul", real, weight(graph, "second")), tmp_path / "g.onnx")
    run = check(path, "int8", tmp_path)
    assert any("its operands are quantized in the file already" in d.why for d in run.plan.decisions)


def test_a_model_without_shapes_is_quantized(tmp_path: Path) -> None:
    """Nothing inside and nothing outside says its size."""
    path = attention(tmp_path / "g.onnx", is_one=False)
    model = ir.load(path)
    for node in model.graph:
        for output in node.outputs:
            output.shape, output.type = None, None
    model.graph.inputs[0].shape = None
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model, path)
    run = check(path, "int8", tmp_path)
    assert {"q", "k", "v", "out"} <= {name for name, decision in sites(run).items() if Slot.WEIGHT in decision.scheme}
