"""One model through both doors: the same sites, ranges, scales and codes; and a graph's own life from file to file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from octavo import pipeline
from octavo.cli.work import check_batch
from octavo.errors import UserError
from octavo.onnx.door import OnnxDoor
from octavo.onnx.fusion import fusion_of
from octavo.sources import open_data, open_model
from octavo.sources.graphs import GraphModule
from octavo.spec.facts import Slot
from onnx import GraphProto, NodeProto, TensorProto, helper

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 64)
        self.second = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        out: torch.Tensor = self.second(torch.nn.functional.gelu(self.first(hidden)))
        return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("graphs") / "net.onnx"
    program = torch.onnx.export(Net().eval(), (X,), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(path)
    return path


def test_what_a_graph_has_is_named_like_the_model_it_came_from(file: Path) -> None:
    facts = OnnxDoor(GraphModule(file), "net", (X,)).facts()
    layers = {site.name: (site.operation, site.weight_shape, site.macs) for site in facts.sites if site.weight_shape}
    assert layers == {
        "conv": ("conv", (8, 27), 16 * 8 * 64 * 27),
        "first": ("linear", (64, 8), 16 * 64 * 8),
        "second": ("linear", (5, 64), 16 * 5 * 64),
    }
    assert facts.num_parameters == sum(sum(site.parameters.values()) for site in facts.sites)


class Alike(nn.Module):
    """Biases that are equal, which exporters store once, under the name of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(x)))
        return out


def test_layers_whose_biases_are_stored_once_have_their_own_names(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    program = torch.onnx.export(Alike().eval(), (x,), dynamo=True, opset_version=18)  # as old as torch's own default
    assert program is not None
    program.save(tmp_path / "alike.onnx")
    facts = OnnxDoor(GraphModule(tmp_path / "alike.onnx"), "alike").facts()
    assert [site.name for site in facts.sites if site.weight_shape] == ["first", "second"]


@pytest.mark.parametrize("target", ["", "onnxruntime-cpu"])
def test_both_doors_find_the_same_ranges_and_codes(file: Path, target: str) -> None:
    torch_run = pipeline.quantize(Net().eval(), "int8", [X], target=target)
    graph_run = pipeline.quantize(open_model(file), "int8", [(X,)], target=target)
    ours = {layer.name: layer for layer in torch_run.door.snapshot().layers()}
    theirs = {layer.name: layer for layer in graph_run.door.snapshot().layers()}
    assert set(ours) == set(theirs)
    for name, layer in ours.items():
        twin = theirs[name]
        assert layer.weight is not None
        assert twin.weight is not None
        assert torch.equal(layer.weight.codes, twin.weight.codes)
        assert torch.equal(layer.weight.scale, twin.weight.scale)  # type: ignore[arg-type]
        assert layer.activations.keys() == twin.activations.keys()
        for slot in layer.activations:
            a, b = layer.activations[slot], twin.activations[slot]
            assert a.format == b.format
            assert torch.allclose(a.scale, b.scale, rtol=1e-4)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(torch_run.model(X), next(iter(graph_run.model(X).values())), atol=0.03)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_fp8_behind_a_relu_is_simulated_alike(activation: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = 8 * torch.randn(64, 32)
    net = nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 8)).eval()
    program = torch.onnx.export(net, (x,), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(tmp_path / "net.onnx")
    theirs = pipeline.quantize(open_model(tmp_path / "net.onnx"), "fp8", [(x,)])
    ours = pipeline.quantize(net, "fp8", [x])
    with torch.no_grad():
        assert torch.allclose(ours.model(x), next(iter(theirs.model(x).values())), atol=2e-2)


class Joined(nn.Module):
    """Three products of one input, which engines join, and one more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(128, 128) for _ in range(3))
        self.k.weight.data *= 5
        self.out = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.q(x) + self.k(x) * self.v(x)))
        return out


@pytest.mark.parametrize(
    "recipe",
    ["int4-group", "int4-group-asymmetric", "int4-group-full-range", "int8-weight-only", "nvfp4-weight-only"],
)
def test_both_doors_store_the_same_weights(tmp_path: Path, recipe: str) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    program = torch.onnx.export(Joined().eval(), (x,), dynamo=True, opset_version=18)
    assert program is not None
    program.save(tmp_path / "joined.onnx")
    models = (Joined(), open_model(tmp_path / "joined.onnx"))
    runs = [pipeline.quantize(model, recipe, sample=(x,)) for model in models]
    ours, theirs = ({layer.name: layer.weight for layer in run.door.snapshot().layers()} for run in runs)
    assert ours.keys() == theirs.keys() == {"q", "k", "v", "out"}
    for name, weight in ours.items():
        twin = theirs[name]
        assert weight is not None
        assert twin is not None
        assert torch.equal(weight.codes, twin.codes)
        assert torch.equal(weight.dequantize(), twin.dequantize())


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic", "nvfp4-weight-only", "int4-group"])
def test_a_run_of_a_graph_comes_back_and_becomes_a_file(file: Path, tmp_path: Path, recipe: str) -> None:
    if recipe in ("int4-group", "nvfp4-weight-only"):  # groups want wider layers
        model, data = open_model(helper_graph(tmp_path / "wide.onnx")), [{"x": torch.randn(4, 128)}]
    else:
        model, data = open_model(file), [(X,)]
    run = pipeline.save(pipeline.quantize(model, recipe, data), tmp_path / "run")
    before = next(iter(run.door.run(data[0]).values()))
    again = pipeline.load(tmp_path / "run")
    assert torch.equal(next(iter(again.door.run(data[0]).values())), before)
    assert pipeline.verify(tmp_path / "run", again, data).agrees
    out = pipeline.export(tmp_path / "run", tmp_path / "onnx", layout="onnx")
    found = pipeline.verify(out, again, data)
    assert found.agrees, found.to_json_object()


def helper_graph(path: Path) -> Path:
    """x -> MatMul [128, 256] -> Relu -> MatMul [256, 64], made by hand, without shapes inside."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((128, 256), (256, 64))]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], name="/a/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], name="/Relu"),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"], name="/b/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor(f"{name}.weight", weight) for name, weight in zip("ab", weights, strict=True)],
    )
    return write(graph, path, opset=17)


def tensor(name: str, array: np.ndarray) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True)


def write(graph: GraphProto, path: Path, *, opset: int) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_sensitivity_works_on_a_graph(tmp_path: Path) -> None:
    from octavo.search.sensitivity import rank_quantizers

    model = open_model(helper_graph(tmp_path / "g.onnx"))
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = model.model(x)["y"]
    run = pipeline.quantize(model, "int8", [{"x": x}])

    def score() -> float:
        return -float((run.door.run({"x": x})["y"] - reference).square().mean())

    ranked = rank_quantizers(run.door, score, higher_is_better=True)
    assert {row.quantizer for row in ranked} == {f"{n}.{q}_quantizer" for n in "ab" for q in ("input", "weight")}
    assert all(row.cost > 0 for row in ranked)
    run.door.strip()
    with torch.no_grad():
        assert torch.equal(model.model(x)["y"], reference)


def test_arrays_are_named_like_the_inputs(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((10, 128)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rows)
    data = open_data(tmp_path / "d.npz")
    assert len(data) == 10
    with pytest.raises(UserError, match=r"has an input 'x' \['n', 128\], and the batch has 'wrong'"):
        open_model(helper_graph(tmp_path / "g.onnx")).model(wrong=torch.zeros(1, 128))


def test_what_onnxruntime_says_of_data_is_said_without_its_own_sources(tmp_path: Path) -> None:
    loaded = open_model(helper_graph(tmp_path / "g.onnx"))
    with pytest.raises(UserError, match=r"data 'd' does not fit model .* says: Got invalid dimensions for input: x"):
        check_batch(loaded, {"x": torch.zeros(1, 5)}, "d")


def test_control_flow_is_left_alone_with_a_reason(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner.weight"], ["z"])],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [tensor("inner.weight", weight)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["i"])],
        "else",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "outer.weight"], ["h"], name="/outer/MatMul"),
        helper.make_node("If", ["flag"], ["b"], then_branch=branch, else_branch=other),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "flow",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor("outer.weight", weight)],
    )
    path = tmp_path / "flow.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    batch = {"x": torch.randn(3, 4), "flag": torch.tensor(True)}
    run = pipeline.quantize(open_model(path), "int8", [batch])
    decisions = {decision.site.name: decision for decision in run.plan.decisions}
    assert Slot.WEIGHT in decisions["outer"].scheme
    assert decisions["inner"].why == "inside a control-flow sub-graph: left alone"
    out = pipeline.export_graph(run, tmp_path / "q.onnx")
    assert out.record.output.endswith("q.onnx")
    assert any(node.op_type == "If" for node in ir.load(tmp_path / "q.onnx").graph)


def test_pieces_of_a_graph_without_shapes_know_what_goes_into_them(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(20)]
    flow = ["x", *(f"h{i}" for i in range(19)), "y"]
    nodes = [helper.make_node("MatMul", [a, w], [b]) for a, w, b in zip(flow[:-1], names, flow[1:], strict=True)]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, (4, 4), np.eye(4).ravel()) for name in names]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "chain.onnx").write_bytes(proto.SerializeToString())
    run = pipeline.quantize(open_model(tmp_path / "chain.onnx"), "int8", [{"x": torch.eye(4)}])
    assert len(run.door.activation_scales()) == 20


def test_activations_that_onnxruntime_cannot_simulate_are_refused_before_any_work(tmp_path: Path) -> None:
    model = open_model(helper_graph(tmp_path / "g.onnx"))
    with pytest.raises(UserError, match=r"'a.input_quantizer' is nvfp4.*quantize the torch model"):
        pipeline.quantize(model, "nvfp4", [{"x": torch.randn(4, 128)}])


def test_a_residual_sum_has_the_convolution_on_its_left_and_what_skips_it_on_its_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("stem", "inner", "last")
    weights = [tensor(f"{n}.weight", rng.standard_normal((4, 4, 3, 3)).astype(np.float32)) for n in names]

    def conv(name: str, source: str, out: str) -> NodeProto:
        return helper.make_node("Conv", [source, f"{name}.weight"], [out], pads=[1, 1, 1, 1], name=f"/{name}/Conv")

    nodes = [
        conv("stem", "x", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        conv("inner", "b", "c"),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        conv("last", "e", "f"),
        helper.make_node("Add", ["f", "x"], ["y"]),  # what comes from outside is no residual of a convolution
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 8, 8]) for name in ("x", "y")]
    path = write(helper.make_graph(nodes, "sums", ends[:1], ends[1:], weights), tmp_path / "sums.onnx", opset=17)
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run = pipeline.quantize(open_model(path), "int8", [x], target="onnxruntime-cpu")
    sums = [decision for decision in run.plan.decisions if decision.site.operation == "add"]
    assert [decision.site.adds for decision in sums] == [("inner", "stem")]
    assert set(sums[0].scheme) == {Slot.LEFT, Slot.RIGHT, Slot.OUTPUT}
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx")
    assert pipeline.verify(out, run, [x]).agrees
    assert fusion_of(out / "model.onnx").kernels["QLinearAdd"] == 1
