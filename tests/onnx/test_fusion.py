"""What is written for onnxruntime on a CPU becomes its integer kernels, none of which computes in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hand_made_graphs import add, empty, finish, initializer
from octavo import pipeline
from octavo.onnx.fusion import Fusion, fusion_of
from octavo.sources import open_model

RNG = np.random.default_rng(0)


def weight(graph: ir.Graph, name: str, *shape: int) -> ir.Value:
    return initializer(graph, f"{name}.weight", (0.2 * RNG.standard_normal(shape)).astype(np.float32))


def quantized(model: ir.Model, tmp_path: Path, recipe: str, x: torch.Tensor) -> tuple[Fusion, pipeline.Run]:
    model.opset_imports.pop("octavo")
    ir.save(model, tmp_path / "float.onnx")
    run = pipeline.quantize(open_model(tmp_path / "float.onnx"), recipe, [{"x": x}], target="onnxruntime-cpu")
    pipeline.export_graph(run, tmp_path / "q.onnx")
    return fusion_of(tmp_path / "q.onnx"), run


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        ("int8", "MatMulIntegerToFloat"),
        ("int8-dynamic", "DynamicQuantizeMatMul"),
        ("int8-weight-only", "MatMulNBits"),
        ("int4-group", "MatMulNBits"),
    ],
)
def test_a_product_becomes_one_kernel(tmp_path: Path, recipe: str, kernel: str) -> None:
    model = empty(("x", ["n", 256]))
    y = add(model.graph, "MatMul", model.graph.inputs[0], weight(model.graph, "a", 256, 128))
    found, _ = quantized(finish(model, y), tmp_path, recipe, torch.randn(8, 256))
    assert found.kernels.get(kernel) == 1
    assert found.unfused == ()


def residual_net() -> ir.Model:
    """x -> conv -> relu -> (conv -> relu -> conv) + skip -> relu -> conv."""
    model = empty(("x", ["n", 4, 8, 8]))
    graph = model.graph

    def conv(value: ir.Value, name: str) -> ir.Value:
        bias = initializer(graph, f"{name}.bias", RNG.standard_normal(8).astype(np.float32))
        kernel = weight(graph, name, 8, 4 if name == "stem" else 8, 3, 3)
        return add(graph, "Conv", value, kernel, bias, pads=[1, 1, 1, 1])

    skip = add(graph, "Relu", conv(graph.inputs[0], "stem"))
    inner = conv(add(graph, "Relu", conv(skip, "one")), "two")
    return finish(model, conv(add(graph, "Relu", add(graph, "Add", inner, skip)), "last"))


def test_every_convolution_of_a_residual_net_runs_in_integers(tmp_path: Path) -> None:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, run = quantized(residual_net(), tmp_path, "int8", x)
    assert found.kernels["QLinearConv"] == 4
    assert found.unfused == ()
    (simulated,) = run.door.run({"x": x}).values()
    fused = open_model(tmp_path / "q.onnx").model(x)
    (value,) = fused.values()
    assert torch.nn.functional.cosine_similarity(simulated.flatten(), value.flatten(), dim=0) > 0.9999


def test_an_output_behind_a_relu_has_a_zero_point_at_the_bottom(tmp_path: Path) -> None:
    """Only then is the ReLU part of the rounding."""
    _, run = quantized(residual_net(), tmp_path, "int8", torch.randn(4, 4, 8, 8))
    layers = {layer.name: layer for layer in run.door.snapshot().layers()}
    by_slot = {slot.value: activation for slot, activation in layers["stem"].activations.items()}
    assert by_slot["output"].zero_point == -128
    assert by_slot["input"].zero_point != -128
