"""Models of the kinds that people have: written, run, and for TensorRT built, as they were simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octavo import pipeline

pytestmark = pytest.mark.slow
IDS = torch.arange(20).view(2, 10)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)), TEXT


def t5() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {**TEXT, "decoder_input_ids": IDS[:, :5]}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    config = WhisperConfig(num_mel_bins=20, max_source_positions=50, **sizes)
    return WhisperEncoder(config), {"input_features": torch.randn(2, 20, 100)}


FOR_CPU, FOR_TENSORRT = ("int8", "onnxruntime-cpu"), ("fp8-attention", "tensorrt")
CASES = [(build, *how) for how in (FOR_CPU, FOR_TENSORRT) for build in (llama, t5, whisper)]


@pytest.mark.parametrize(("build", "recipe", "target"), CASES)
def test_files_mean_what_was_simulated(build: Any, recipe: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = build()
    run = pipeline.quantize(model.eval(), recipe, [batch], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=batch)
    found = pipeline.verify(out, run, [batch]).to_json_object()
    assert found["agrees"], found
    assert {graph["file"] for graph in found["graphs"]} == (
        {"encoder_model.onnx", "decoder_model.onnx"} if build is t5 else {"model.onnx"}
    )
    if target == "onnxruntime-cpu":
        assert all(graph["unfused"] == () for graph in found["graphs"])


def test_floats_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    import onnx_ir as ir

    torch.manual_seed(0)
    x = torch.randn(8, 64)
    run = pipeline.quantize(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), "fp8", [x])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=x, dtype=torch.float16)
    graph = ir.load(out / "model.onnx").graph
    kinds = {value.const_value.dtype.name for value in graph.initializers.values() if value.const_value is not None}
    assert {"FLOAT8E4M3FN", "FLOAT16"} <= kinds
    assert "FLOAT" not in kinds
    assert pipeline.verify(out, run).agrees
