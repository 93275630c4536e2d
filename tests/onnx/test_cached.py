"""A language model's file takes keys and values of earlier tokens, and goes on as the simulated model does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from octavo import pipeline
from octavo.errors import UserError
from octavo.onnx.cached import why_without

pytestmark = pytest.mark.slow
IDS = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(3))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


class Session:
    """The file as a generator uses it: a prompt, then token by token."""

    def __init__(self, path: Path, *, optimized: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def step(self, tokens: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = next(iter(past.values())).shape[2]
        (batch, new), total = tokens.shape, start + tokens.shape[1]
        given = {"input_ids": tokens, "attention_mask": np.ones((batch, total), np.int64), **past}
        given["position_ids"] = np.broadcast_to(np.arange(start, total), (batch, new)).copy()
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))

    def greedy(self, prompt: np.ndarray, num_tokens: int) -> np.ndarray:
        names = [name for name in self.inputs if name.startswith("past_key_values")]
        past = {name: np.zeros((len(prompt), 2, 0, 16), np.float32) for name in names}
        tokens, rows = prompt, [prompt]
        for _ in range(num_tokens):
            found = self.step(tokens, past)
            tokens = found["logits"][:, -1:].argmax(-1)
            past = {name: found[name.replace("past_key_values", "present")] for name in names}
            rows.append(tokens)
        return np.concatenate(rows, 1)


@pytest.mark.parametrize(("recipe", "target"), [("fp8-kv", ""), ("int8", "onnxruntime-cpu")])
def test_the_file_continues_a_prompt_as_the_simulation_does(recipe: str, target: str, tmp_path: Path) -> None:
    run = pipeline.quantize(llama(), recipe, [TEXT], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=TEXT)
    file = Session(out / "model.onnx", optimized=False)
    assert file.inputs[:3] == ["input_ids", "attention_mask", "position_ids"]
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert file.inputs[3:] == [f"past_key_values.{name}" for name in names]
    assert file.outputs == ["logits", *(f"present.{name}" for name in names)]
    assert json.loads((out / "octavo_onnx.json").read_text())["cache"] is True
    expected = run.model.generate(IDS[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=12, do_sample=False)
    assert file.greedy(IDS[:, :5].numpy(), 12).tolist() == expected.tolist()
    found = pipeline.verify(out, run, [TEXT]).to_json_object()
    assert found["agrees"], found
    if recipe == "fp8-kv":
        assert any("k_cache_quantizer" in node for node in quantized_nodes(out / "model.onnx"))


def quantized_nodes(path: Path) -> list[str]:
    import onnx_ir as ir

    return [node.metadata_props.get("octavo.quantizer", "") for node in ir.load(path).graph]


def test_a_file_that_keeps_other_values_is_noticed(tmp_path: Path) -> None:
    import onnx_ir as ir

    run = pipeline.quantize(llama(), "fp8-kv", [TEXT])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=TEXT)
    model = ir.load(out / "model.onnx")
    outputs = {value.name: value for value in model.graph.outputs}
    key, value = outputs["present.1.key"], outputs["present.1.value"]
    key.name, value.name = "present.1.value", "present.1.key"
    ir.save(model, out / "model.onnx")
    (graph,) = pipeline.verify(out, run, [TEXT]).graphs
    assert not graph.agrees
    assert "present.1.key" in graph.to_json_object()["different_outputs"]


def test_a_file_without_cache_is_written_where_asked_for(tmp_path: Path) -> None:
    run = pipeline.quantize(llama(), "int8", [TEXT])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=TEXT, use_cache=False)
    assert Session(out / "model.onnx").outputs == ["logits"]
    assert pipeline.verify(out, run, [TEXT]).agrees
    with pytest.raises(UserError, match="layout 'modelopt' has no cache to leave out"):
        pipeline.export(run, tmp_path / "other", layout="modelopt", use_cache=False)


def test_what_cannot_keep_a_past_is_written_without_and_the_reason_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    batch = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100)).eval()
    run = pipeline.quantize(model, "int8", [batch], target="onnxruntime-cpu")
    with caplog.at_level(logging.WARNING, "octavo"):
        out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=batch)
    assert "without a cache of keys and values: it takes token_type_ids beside tokens" in caplog.text
    assert Session(out / "model.onnx").outputs == ["logits"]
    assert pipeline.verify(out, run, [batch]).agrees


def test_a_memory_that_is_no_keys_and_values_is_told() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 100}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    assert "its past is no plain cache of keys and values" in why_without(model, {"input_ids": IDS})


def test_every_size_stays_open(tmp_path: Path) -> None:
    run = pipeline.quantize(llama(), "fp8-kv", [TEXT])
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample={"input_ids": IDS[:1, :2]})
    file = Session(out / "model.onnx")
    shapes = {value.name: value.shape for value in file.session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "past_sequence", 16]
    for batch, past, new in ((3, 7, 1), (1, 0, 1), (2, 3, 4)):
        kept: dict[str, Tensor] = {n: torch.randn(batch, 2, past, 16) for n in file.inputs if "past" in n}
        tokens = torch.randint(0, 100, (batch, new))
        found = file.step(tokens.numpy(), {name: value.numpy() for name, value in kept.items()})
        assert found["logits"].shape == (batch, new, 100)
        assert found["present.1.value"].shape == (batch, 2, past + new, 16)


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = T5Config(decoder_start_token_id=0, eos_token_id=99, **sizes)
    return T5ForConditionalGeneration(config).eval(), {**TEXT, "decoder_input_ids": IDS[:, :6]}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "vocab_size": 100, "num_mel_bins": 20, "max_source_positions": 50, "init_std": 0.2}
    sizes |= {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _WHISPER.items()}
    tokens = {"pad_token_id": 99, "bos_token_id": 98, "eos_token_id": 99, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).eval()  # type: ignore[arg-type]
    return model, {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": IDS[:, :6]}


_WHISPER = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}


@pytest.mark.parametrize(("build", "recipe", "target"), [(t5, "int8", "onnxruntime-cpu"), (whisper, "fp8-kv", "")])
def test_keys_and_values_of_the_source_come_from_the_encoder(
    build: Any, recipe: str, target: str, tmp_path: Path
) -> None:
    model, batch = build()
    run = pipeline.quantize(model, recipe, [batch], target=target)
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx", sample=batch)
    found = pipeline.verify(out, run, [batch]).to_json_object()
    assert found["agrees"], found
    encoder = Session(out / "encoder_model.onnx", optimized=False)
    decoder = Session(out / "decoder_model.onnx", optimized=False)
    names = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert encoder.outputs == ["encoder_hidden_states", *(f"present.{n[:1]}.encoder{n[1:]}" for n in names)]
    assert decoder.outputs == ["logits", *(f"present.{n[:1]}.decoder{n[1:]}" for n in names)]
    source = {name: value.numpy() for name, value in batch.items() if name in encoder.inputs}
    given = dict(zip(encoder.outputs, encoder.session.run(None, source), strict=True))
    past = {n: given[n.replace("past_key_values", "present")] for n in decoder.inputs if ".encoder." in n}
    past |= {n: np.zeros((2, 4, 0, 16), np.float32) for n in decoder.inputs if ".decoder." in n}
    mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
    tokens = batch["decoder_input_ids"][:, :3].numpy()
    rows = [tokens]
    for _ in range(8):
        output = decoder.session.run(None, {"decoder_input_ids": tokens, **mask, **past})
        kept = dict(zip(decoder.outputs, output, strict=True))
        past |= {n: kept[n.replace("past_key_values", "present")] for n in past if ".decoder." in n}
        tokens = kept["logits"][:, -1:].argmax(-1)
        rows.append(tokens)
    assert np.array_equal(np.concatenate(rows, 1), greedy(run.model, batch, 8))


@torch.no_grad()
def greedy(model: nn.Module, batch: dict[str, Tensor], num_tokens: int) -> np.ndarray:
    """The simulated model with an empty cache, whose quantizers round, and all tokens again for each new one."""
    tokens = batch["decoder_input_ids"][:, :3]
    for _ in range(num_tokens):
        logits = model(**{**batch, "decoder_input_ids": tokens}, use_cache=True)["logits"]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens.numpy()
