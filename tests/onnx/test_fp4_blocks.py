"""NVFP4 activations in files for TensorRT: what the operator means is in the file, and is what was simulated."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from octavo import pipeline
from octavo.errors import UserError
from octavo.numerics.qtensor import QTensor, quantize
from octavo.onnx import runners
from octavo.onnx.fp4_blocks import DOMAIN, NAME, add_fp4_function
from octavo.onnx.tensorrt import build_engines, is_installed
from octavo.readers.graph_file import read_graphs
from octavo.spec.formats import NVFP4
from octavo.spec.recipe import Recipe
from onnx import TensorProto, helper

pytest.importorskip("onnxscript")


def by_the_file(x: np.ndarray, outer: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by onnx's reference evaluator."""
    where = {"axis": -1, "block_size": 16, "scale_type": int(TensorProto.FLOAT8E4M3FN)}
    node = helper.make_node(NAME, ["x", "outer"], ["codes", "scales"], domain=DOMAIN, **where)
    given = [("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape), ("outer", TensorProto.FLOAT, ())]
    made = [("codes", TensorProto.FLOAT4E2M1), ("scales", TensorProto.FLOAT8E4M3FN)]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(*value) for value in given],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in made],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11))
    add_fp4_function(model)
    codes, scales = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x, "outer": np.float32(outer)})
    return np.asarray(codes).view(np.uint8), np.asarray(scales).view(np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("outer", [0.001, 0.0123, 1.0])
def test_the_function_gives_the_codes_of_the_format(dtype: type, outer: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64) * torch.logspace(-7, 2, 15).view(3, 5, 1)
    x[0, 0, :16], x[1, 1, :16], x[2, 2, 3] = 0.0, 1e-7, 30000.0  # nothing, less than a scale holds, more than it
    x = torch.from_numpy(x.numpy().astype(dtype))
    codes, scales = by_the_file(x.numpy(), outer)
    q = quantize(x.float(), NVFP4, outer_scale=torch.tensor(outer))
    assert isinstance(q.scale, QTensor)
    assert np.array_equal(scales, q.scale.codes.numpy())
    real = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    steps = (scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(outer)).repeat(16, axis=-1)
    assert np.array_equal(real * steps, q.dequantize().numpy())  # also where a zero has another sign


def layers(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 128)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 128), (2, 16, 128), (2, 3, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_means_what_was_simulated(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape)
    run = pipeline.quantize(layers(), "nvfp4", [x], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=dtype)
    (graph,) = pipeline.verify(out, run, [x]).to_json_object()["graphs"]
    assert graph["agrees"], graph
    assert graph["num_nodes"] == 2
    found = {entry.name: entry.format for entry in read_graphs(out).entries if entry.kind == "activation"}
    assert found == {f"{name}.input_quantizer": "float4e2m1 blocks of 16" for name in "02"}
    if is_installed():
        engine = graph["engines"]["Blackwell (SM120)"]
        assert engine["num_bytes"], engine["problem"]
        assert bool(engine["float_products"]) == (len(shape) == 4)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="needs the extra 'tensorrt'")
def test_tensorrt_knows_the_width_behind_attention(tmp_path: Path) -> None:
    """Its heads are joined by a Reshape that leaves the width to be found."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes), add_pooling_layer=False).eval()
    batch = {"input_ids": torch.randint(99, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    run = pipeline.quantize(model, "nvfp4", [batch], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=batch, dtype=torch.float16)
    engine = build_engines(out / "model.onnx", dict.fromkeys(batch, (2, 16)))["Blackwell (SM120)"]
    assert engine.num_bytes, engine.problem
    assert not engine.float_products


def test_the_reference_evaluator_gathers_from_any_number(tmp_path: Path) -> None:
    node = helper.make_node("GatherElements", ["x", "at"], ["y"], axis=1)
    values = [("x", TensorProto.FLOAT, (1, 64)), ("at", TensorProto.INT64, (1, 40)), ("y", TensorProto.FLOAT, (1, 40))]
    x, at, y = (helper.make_tensor_value_info(*value) for value in values)
    graph = helper.make_graph([node], "one", [x, at], [y])
    opsets = [helper.make_opsetid("", 21)]
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    given = {"x": np.arange(64, dtype=np.float32)[None], "at": np.arange(40)[None]}
    (found,) = runners._reference(tmp_path / "g.onnx", None, False).run(given)
    assert np.array_equal(found, given["x"][:, :40])


@pytest.mark.parametrize(
    ("rule", "target", "reason"),
    [
        ({"weight": "nvfp4", "input": "nvfp4"}, "", "--target tensorrt"),
        ({"weight": "e4m3-channel", "input": "nvfp4"}, "tensorrt", "weights that meet it"),
        ({"input": "nvfp4"}, "tensorrt", "weights that meet it"),
    ],
)
def test_what_it_cannot_do_is_said(rule: dict[str, str], target: str, reason: str) -> None:
    recipe = Recipe("r", ()).quantize("operation:linear", **rule)
    with pytest.raises(UserError, match=reason):
        pipeline.plan(layers(), recipe, sample=torch.randn(8, 128), target=target, layouts=["onnx"])


def test_channels_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="16"):
        pipeline.plan(layers(120), "nvfp4", sample=torch.randn(8, 120), target="tensorrt", layouts=["onnx"])
