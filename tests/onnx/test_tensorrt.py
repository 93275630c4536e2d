"""TensorRT parses what is written for it, and builds engines, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo import pipeline
from octavo.errors import UserError
from octavo.onnx.tensorrt import ARCHITECTURES, build_engines, is_installed
from octavo.spec.recipe import presets

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="needs the extra 'tensorrt'")]


COMPUTED_IN_FLOAT = ("fp8-dynamic", "w4a8-nvfp4")


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        attended: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


@pytest.mark.parametrize("recipe", [recipe.name for recipe in presets() if not recipe.steps])
def test_every_preset_is_refused_before_calibration_or_becomes_an_engine(tmp_path: Path, recipe: str) -> None:
    x = torch.randn(8, 128)
    try:
        pipeline.plan(layers(), recipe, sample=x, target="tensorrt", layouts=["onnx"])
    except UserError:
        return
    run = pipeline.quantize(layers(), recipe, [x], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=torch.float16)
    (graph,) = pipeline.verify(out, run, [x]).to_json_object()["graphs"]
    assert graph["agrees"], graph
    assert set(graph["engines"]) == set(ARCHITECTURES)
    for name, engine in graph["engines"].items():
        needs_more = "fp4" in recipe and "Ada" in name
        assert bool(engine["needs"]) == needs_more
        assert bool(engine["num_bytes"]) != needs_more
        assert not engine["wide_weights"]
        assert bool(engine["float_products"]) == (recipe in COMPUTED_IN_FLOAT and not needs_more)


def test_attention_is_fused_in_fp8(tmp_path: Path) -> None:
    x = torch.randn(2, 32, 128)
    run = pipeline.quantize(Attention().eval(), "fp8-attention", [x], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=torch.float16)
    (graph,) = pipeline.verify(out, run, [x]).to_json_object()["graphs"]
    assert graph["agrees"], graph
    assert graph["engines"] == {name: graph["engines"][name] | {"unfused_attention": ()} for name in ARCHITECTURES}
    assert not any(engine["float_products"] for engine in graph["engines"].values())


def test_without_rounded_probabilities_attention_falls_apart(tmp_path: Path) -> None:
    x = torch.randn(2, 32, 128)
    run = pipeline.quantize(Attention().eval(), "fp8-attention", [x])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=torch.float16)
    for engine in build_engines(out / "model.onnx", {"x": (2, 32, 128)}).values():
        assert len(engine.unfused_attention) == 1
        assert len(engine.float_products) == 0


def test_what_tensorrt_refuses_is_said(tmp_path: Path) -> None:
    x = torch.randn(8, 128)
    run = pipeline.quantize(nn.Linear(128, 64), "int8", [x], target="openvino")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x)
    built = build_engines(out / "model.onnx", {"input": (8, 128)})
    assert all("zero point" in engine.problem for engine in built.values())


def test_any_sequence_builds_and_one_length_is_fused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = BertModel(BertConfig(vocab_size=100, **sizes), add_pooling_layer=False).eval()
    run = pipeline.quantize(model, "fp8-attention", [batch], target="tensorrt")
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=batch, dtype=torch.float16)
    shapes = dict.fromkeys(batch, (2, 32))  # with 16 there is nothing to fuse
    for one_length in (True, False):
        for engine in build_engines(out / "model.onnx", shapes, one_length=one_length).values():
            assert engine.num_bytes
            assert not engine.wide_weights
            assert bool(engine.unfused_attention) != one_length
