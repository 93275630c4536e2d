"""Every rule of every target, looked for in files that are written for it from graphs made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import pytest
import torch

from octavo import pipeline
from octavo.errors import UserError
from octavo.onnx.fake_quantize import QUANTIZER
from octavo.onnx.fusion import fusion_of
from octavo.onnx.lower import WEIGHT
from octavo.sources import open_model
from octavo.spec.targets import TARGETS
from onnx import NodeProto, TensorProto, helper

SHAPES = {"net": (4, 8, 8), "tokens": (6, 128), "stream": (6, 128)}


def constant(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(sum(map(ord, name))).standard_normal(shape).astype(np.float32)
    return helper.make_tensor(name, TensorProto.FLOAT, shape, values.tobytes(), raw=True)


def net() -> tuple[list[NodeProto], list[TensorProto]]:
    """x -> stem -> ReLU -> (inner +) -> ReLU -> last -> ReLU -> mean -> head."""

    def conv(name: str, source: str, out: str) -> NodeProto:
        return helper.make_node("Conv", [source, f"{name}.weight", f"{name}.bias"], [out], name=f"/{name}/Conv")

    nodes = [
        conv("stem", "x", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        conv("inner", "b", "c"),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        conv("last", "e", "f"),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "head.weight", "head.bias"], ["y"], transB=1, name="/head/Gemm"),
    ]
    sizes = {"stem": (8, 4, 1, 1), "inner": (8, 8, 1, 1), "last": (128, 8, 1, 1), "head": (64, 128)}
    weights = [constant(f"{name}.weight", *shape) for name, shape in sizes.items()]
    return nodes, weights + [constant(f"{name}.bias", shape[0]) for name, shape in sizes.items()]


def tokens() -> tuple[list[NodeProto], list[TensorProto]]:
    """Attention of one head between its projections."""

    def product(name: str, source: str, out: str) -> NodeProto:
        return helper.make_node("MatMul", [source, f"{name}.weight"], [out], name=f"/{name}/MatMul")

    nodes = [
        *(product(name, "x", name) for name in ("q", "k", "v")),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="/attention/MatMul"),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["context"], name="/attention/MatMul_1"),
        product("o", "context", "y"),
    ]
    weights = [constant(f"{name}.weight", 128, 128) for name in "qkvo"]
    return nodes, [*weights, helper.make_tensor("scale", TensorProto.FLOAT, (), [0.001])]


def stream() -> tuple[list[NodeProto], list[TensorProto]]:
    """A residual stream whose sum a norm reads, and what follows."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["a"], name="/up/MatMul"),
        helper.make_node("Add", ["a", "x"], ["b"], name="/Add"),
        helper.make_node(
            "LayerNormalization", ["b", "norm.weight", "norm.bias"], ["c"], name="/norm/LayerNormalization"
        ),
        helper.make_node("MatMul", ["c", "down.weight"], ["y"], name="/down/MatMul"),
    ]
    return nodes, [
        *(constant(f"{name}.weight", 128, 128) for name in ("up", "down")),
        *(constant(f"norm.{name}", 128) for name in ("weight", "bias")),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """The file of a graph, a recipe and a target."""

    @cache
    def write(graph: str, recipe: str, target: str) -> Path:
        place = tmp_path_factory.mktemp("placement")
        nodes, weights = {"net": net, "tokens": tokens, "stream": stream}[graph]()
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPES[graph]]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ]
        proto = helper.make_graph(nodes, graph, ends[:1], ends[1:], weights)
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (place / "graph.onnx").write_bytes(model.SerializeToString())
        x = torch.randn(16, *SHAPES[graph], generator=torch.Generator().manual_seed(0)).abs() - 0.2
        run = pipeline.quantize(open_model(place / "graph.onnx"), recipe, [x], target=target)
        out = pipeline.export(run, place / "out", layout="onnx")
        assert pipeline.verify(out, run, [x]).agrees
        return out / "model.onnx"

    return write


# -- what a file holds


def array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def activations(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Quantizer, scale and zero point of every static activation."""
    for node in ir.load(path).graph:
        if QUANTIZER in node.metadata_props and node.op_type == "QuantizeLinear":
            yield node.metadata_props[QUANTIZER], array(node.inputs[1]), array(node.inputs[2])


def weights(path: Path) -> Iterator[ir.Node]:
    """The DequantizeLinear of every stored weight."""
    return (node for node in ir.load(path).graph if WEIGHT in node.metadata_props)


def nodes_of(path: Path, op_type: str) -> list[ir.Node]:
    return [node for node in ir.load(path).graph if node.op_type == op_type]


def has_unsigned_activations(path: Path) -> None:
    points = [point for _, _, point in activations(path)]
    assert {point.dtype.name for point in points} == {"uint8"}
    assert any(point not in (0, 128) for point in points)


def has_symmetric_weights(path: Path) -> None:
    for node in weights(path):
        codes, scale, point = map(array, node.inputs[:3])
        assert codes.dtype.name == "int8"
        assert scale.ndim == 1
        assert len(scale) > 1
        assert not point.any()


def largest_code(path: Path) -> int:
    return max(int(abs(array(node.inputs[0]).astype(int)).max()) for node in weights(path))


# -- the rules

Write = Callable[[str, str, str], Path]


def check_u8s8(write: Write, target: str) -> None:
    for graph in SHAPES:
        has_unsigned_activations(write(graph, "int8", target))
        has_symmetric_weights(write(graph, "int8", target))


def check_seven_bits(write: Write, target: str) -> None:
    assert largest_code(write("net", "int8", target)) in (63, 64)
    assert largest_code(write("net", "int8-weight-only", target)) == 127  # these meet no integers


def check_eight_bits(write: Write, target: str) -> None:
    assert largest_code(write("net", "int8", target)) == 127


def check_dynamic(write: Write, target: str) -> None:
    path = write("tokens", "int8-dynamic", target)
    assert {node.op_type for node in ir.load(path).graph} & {"QuantizeLinear", "DynamicQuantizeLinear"} == {
        "DynamicQuantizeLinear"
    }
    kernels = fusion_of(path).kernels  # q, k and v share what is found of x
    integers = ("DynamicQuantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    assert [kernels[name] for name in integers] == [1, 3, 1]


def check_conv_outputs(write: Write, target: str) -> None:
    path = write("net", "int8", target)
    for node in nodes_of(path, "Conv"):
        (reader,) = node.outputs[0].consumers()
        (reader,) = reader.outputs[0].consumers() if reader.op_type == "Relu" else (reader,)
        assert reader.op_type == "QuantizeLinear"
    kernels = fusion_of(path).kernels
    assert kernels["QLinearConv"] == 3
    assert not kernels.keys() & {"Conv", "FusedConv", "Relu"}


def check_sums(write: Write, target: str) -> None:
    kernels = fusion_of(write("net", "int8", target)).kernels
    assert kernels["QLinearAdd"] == 1
    assert "Add" not in kernels


def check_sums_before_norms(write: Write, target: str) -> None:
    kernels = fusion_of(write("stream", "int8", target)).kernels
    assert (kernels["Sum"], kernels["LayerNormalization"], kernels.get("SkipLayerNormalization", 0)) == (1, 1, 0)
    plain = fusion_of(write("stream", "int8", "onnxruntime-cuda")).kernels  # on a CPU, to see that the rule does it
    assert plain["SkipLayerNormalization"] == 1


def check_biases(write: Write, target: str) -> None:
    path = write("net", "int8", target)
    for node in [*nodes_of(path, "Conv"), *nodes_of(path, "Gemm")]:
        given, weight, bias = (value.producer() if value is not None else None for value in node.inputs)
        assert given is not None
        assert weight is not None
        assert bias is not None
        assert array(bias.inputs[0]).dtype == np.int32
        assert not array(bias.inputs[2]).any()
        assert np.array_equal(array(bias.inputs[1]), array(given.inputs[1]) * array(weight.inputs[1]))


def check_symmetric(write: Write, target: str) -> None:
    for graph in SHAPES:
        path = write(graph, "int8", target)
        assert {(point.dtype.name, int(point)) for _, _, point in activations(path)} == {("int8", 0)}
        has_symmetric_weights(path)


def check_skip(write: Write, target: str) -> None:
    (add,) = nodes_of(write("net", "int8", target), "Add")
    makers = {value.producer().op_type for value in add.inputs}  # type: ignore[union-attr]
    assert makers == {"Conv", "DequantizeLinear"}


def check_softmax(write: Write, target: str) -> None:
    scales = {name: scale for name, scale, _ in activations(write("tokens", "fp8-attention", target))}
    (softmax,) = (float(scale) for name, scale in scales.items() if name.endswith("softmax_quantizer"))
    assert softmax == np.float32(1 / 448)


def check_scaled_queries(write: Write, target: str) -> None:
    path = write("tokens", "fp8-attention", target)
    (softmax,) = nodes_of(path, "Softmax")
    product = softmax.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None
    assert product.op_type == "MatMul"
    back = product.inputs[0].producer()  # type: ignore[union-attr]
    assert back is not None
    assert back.op_type == "DequantizeLinear"
    source = back.inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]
    assert source is not None
    assert source.op_type == "Mul"


def check_granularity(write: Write, target: str) -> None:
    for recipe in ("int8", "fp8"):
        assert all(scale.ndim == 0 for _, scale, _ in activations(write("tokens", recipe, target)))
    assert {node.attributes["block_size"].as_int() for node in weights(write("tokens", "int4-group", target))} == {128}


def check_no_outputs(write: Write, target: str) -> None:
    for op_type in ("Conv", "Gemm"):
        for node in nodes_of(write("net", "int8", target), op_type):
            assert not any(reader.op_type == "QuantizeLinear" for reader in node.outputs[0].consumers())


def check_one_kind(write: Write, target: str) -> None:
    with pytest.raises(UserError, match=target):
        write("tokens", "w4a8", target)


def check_block_scales(write: Write, target: str) -> None:
    kinds = {v.dtype for v in ir.load(write("tokens", "mxfp4-weight-only", target)).graph.initializers.values()}
    assert ir.DataType.FLOAT4E2M1 in kinds
    assert ir.DataType.FLOAT8E8M0 not in kinds


def check_blocks(write: Write, target: str) -> None:
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(),
        torch.randn(4, 64),
    )  # graphs are not simulated in FP4
    with TemporaryDirectory() as place:
        run = pipeline.quantize(model, "nvfp4", [x], target=target)
        path = pipeline.export(run, Path(place, "out"), layout="onnx", sample=x) / "model.onnx"
        (node,) = nodes_of(path, "TRT_FP4DynamicQuantize")
    assert (node.domain, node.attributes["block_size"].as_int()) == ("trt", 16)
    assert {value.dtype for value in node.outputs} == {ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN}
    assert array(node.inputs[1]).shape == ()


def check_openvino(write: Write, target: str) -> None:
    openvino = pytest.importorskip("openvino")
    check_u8s8(write, target)
    compiled = openvino.Core().compile_model(str(write("net", "int8", target)), "CPU")
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    convs = [info for info in infos if info["layerType"].astype(str) == "Convolution"]
    assert convs
    assert {info["runtimePrecision"].astype(str) for info in convs} == {"u8"}


CHECKS: dict[str, Callable[[Write, str], None]] = {
    "activations UINT8 and asymmetric": check_u8s8,
    "7-bit weights": check_seven_bits,
    "8-bit weights": check_eight_bits,
    "dynamic activations": check_dynamic,
    "outputs of convolutions": check_conv_outputs,
    "sums of what quantized convolutions give": check_sums,
    "residual sums in front of norms": check_sums_before_norms,
    "biases of Gemm and Conv": check_biases,
    "activations and weights INT8 and symmetric": check_symmetric,
    "what skips a convolution": check_skip,
    "attention in FP8": check_softmax,
    "queries are scaled": check_scaled_queries,
    "symmetric only": check_symmetric,
    "activations per tensor": check_granularity,
    "no Q/DQ on outputs": check_no_outputs,
    "operands of a product": check_one_kind,
    "E8M0 scales": check_block_scales,
    "inputs in NVFP4": check_blocks,
    "activations UINT8, weights INT8": check_openvino,
}
RULES = [(target.name, rule.text) for target in TARGETS.values() for rule in target.rules]


@pytest.mark.parametrize(("target", "rule"), RULES, ids=lambda value: value[:40])
def test_a_rule_of_a_target_is_kept(written: Write, target: str, rule: str) -> None:
    (check,) = (check for start, check in CHECKS.items() if rule.startswith(start))
    check(written, target)
