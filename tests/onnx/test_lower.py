"""What a graph computes after its quantizers were spelled in standard operators is what was simulated, to the bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hand_made_graphs import add, empty, fake, finish, initializer
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scaling import amax, min_max, scale_from_amax, scale_from_range
from octavo.onnx.lower import WEIGHT, Style, lower
from octavo.onnx.storage import opset_of_format, weight_problem
from octavo.spec.element import E4M3
from octavo.spec.formats import FORMATS, tensor_format
from octavo.spec.tensor_format import PerTile, scaled

WEIGHTS = {
    **{name: fmt for name, fmt in FORMATS.items() if not weight_problem(fmt) and "token" not in name},
    "e4m3-tiles": scaled(E4M3, PerTile(2, 128)),
}
ACTIVATIONS = [
    "int8-tensor",
    "int8-tensor-asymmetric",
    "int7-tensor",
    "int4-tensor-asymmetric",
    "e4m3-tensor",
    "e5m2-tensor",
]
DYNAMIC = ["int8-token", "int8-tensor", "int8-tensor-asymmetric", "int8-token-asymmetric", "int4-token", "e4m3-token"]


def evaluate(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)[0]  # type: ignore[no-any-return]


SOME = ["int8-channel", "int4-group32-asymmetric", "e4m3-tensor", "nvfp4"]


@pytest.mark.parametrize(
    ("reader", "name"),
    [*(("matmul", name) for name in WEIGHTS), *((r, name) for r in ("gemm", "rows") for name in SOME)],
)
def test_a_stored_weight_means_what_was_simulated(reader: str, name: str) -> None:
    fmt = WEIGHTS[name]
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    model = empty(("x", ["n", 256]))
    graph = model.graph
    w = fake(graph, initializer(graph, "w", weight.numpy()), fmt)
    x = graph.inputs[0]
    match reader:
        case "matmul":
            y = add(graph, "MatMul", x, add(graph, "Transpose", w, perm=[1, 0]))
        case "gemm":
            y = add(graph, "Gemm", x, w, transB=1)
        case _:
            y = add(
                graph, "MatMul", add(graph, "Identity", x), add(graph, "Transpose", add(graph, "Neg", w), perm=[1, 0])
            )
    lower(finish(model, y), Style(), opset=opset_of_format(fmt))
    expected = fake_quantize(weight, fmt).T * (-1 if reader == "rows" else 1)
    assert np.array_equal(evaluate(model, x=np.eye(256, dtype=np.float32)), expected.numpy())
    assert "w" not in graph.initializers  # nothing of the float weight is left in the file
    stored = graph.initializers["w_codes"].const_value
    assert stored is not None
    assert stored.nbytes * 8 <= weight.numel() * 8  # one byte at most


@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_static_activation_gives_the_same_values(name: str, is_unsigned: bool) -> None:
    fmt = tensor_format(name)
    x = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 40.0  # saturates
    if fmt.is_symmetric:
        scale, zero = scale_from_amax(torch.tensor(7.0), fmt), None
    else:
        scale, zero = scale_from_range(torch.tensor(-2.0), torch.tensor(7.0), fmt)
    model = empty(("x", ["n", 50]))
    parts = [initializer(model.graph, "s", scale.numpy())]
    if zero is not None:
        parts.append(initializer(model.graph, "z", zero.int().numpy()))
    finish(model, fake(model.graph, model.graph.inputs[0], fmt, *parts))
    lower(model, Style(unsigned_activations=is_unsigned), opset=21)
    expected = fake_quantize(x, fmt, scale=scale, zero_point=zero)
    assert np.array_equal(evaluate(model, x=x.numpy()), expected.numpy())
    kinds = {n.op_type for n in model.graph}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds <= {"QuantizeLinear", "DequantizeLinear", "Clip"}


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_activation_gives_the_same_values(name: str) -> None:
    fmt = tensor_format(name)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(3))
    x[1, 2] = 0.0  # a token of zeros
    model = empty(("x", ["n", "t", 40]))
    finish(model, fake(model.graph, model.graph.inputs[0], fmt))
    lower(model, Style(), opset=21)
    found = torch.from_numpy(evaluate(model, x=x.numpy()))
    if fmt.is_symmetric:
        step = scale_from_amax(amax(x, fmt.granularity), fmt)
    else:
        step = scale_from_range(*min_max(x, fmt.granularity), fmt)[0]
    off = ((found - fake_quantize(x, fmt)).abs() / (step.unsqueeze(-1) if step.ndim else step)).round()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 0.001


def test_a_convolution_keeps_its_kernel_in_place() -> None:
    fmt = tensor_format("int8-channel")
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    model = empty(("x", ["n", 3, 5, 5]))
    graph = model.graph
    matrix = add(graph, "Reshape", initializer(graph, "w", weight.numpy()), initializer(graph, "m", np.array([4, -1])))
    scale = scale_from_amax(weight.flatten(1).abs().amax(1), fmt)
    rounded = fake(graph, matrix, fmt, initializer(graph, "s", scale.numpy()))
    kernel = add(graph, "Reshape", rounded, initializer(graph, "k", np.array([4, 3, 2, 2])))
    lower(finish(model, add(graph, "Conv", graph.inputs[0], kernel)), Style(), opset=21)
    assert [n.op_type for n in graph] == ["DequantizeLinear", "Conv"]
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(5))
    expected = torch.conv2d(x, fake_quantize(weight.flatten(1), fmt).view(4, 3, 2, 2))
    assert np.allclose(evaluate(model, x=x.numpy()), expected.numpy(), atol=1e-5)
    assert WEIGHT in graph[0].metadata_props


def test_explicit_zero_points_are_zero_where_the_format_is_symmetric() -> None:
    fmt = tensor_format("int8-channel")
    model = empty(("x", ["n", 8]))
    graph = model.graph
    w = fake(graph, initializer(graph, "w", np.ones((8, 8), np.float32)), fmt)
    lower(finish(model, add(graph, "MatMul", graph.inputs[0], w)), Style(), opset=21)
    (dequantize,) = (n for n in graph if n.op_type == "DequantizeLinear")
    zero = dequantize.inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    assert not zero.const_value.numpy().any()
