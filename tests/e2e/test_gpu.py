"""A GPU gives what a processor gives: the same workflow, files that do not tell where they were made."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import octavo
from e2e.test_every_preset import NAMES, Small, batches
from octavo.export.base import EXPORTERS
from octavo.spec.recipe import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def llama() -> LlamaForCausalLM:
    """Two layers, grouped queries."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(device: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(96, (2, 24), generator=generator).to(device)} for _ in range(3)]


def close(here: torch.Tensor, there: torch.Tensor) -> float:
    """Signal to difference, in decibels."""
    here, there = here.double().cpu(), there.double().cpu()
    return float(10 * torch.log10(here.square().sum() / (here - there).square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize("preset", NAMES)
@torch.no_grad()
def test_every_preset_runs_there_and_its_files_open_here(preset: str, tmp_path: Path) -> None:
    data = [batch.cuda() for batch in batches()]
    original = Small().cuda()
    reference = original(data[0])
    run = octavo.quantize(original, preset, data)
    expected = run.model(data[0])
    here = octavo.quantize(Small(), preset, batches())
    error_here = close(Small()(batches()[0]), here.model(batches()[0]))
    assert close(reference, expected) > error_here - 1.0
    if not load_recipe(preset).steps:
        assert close(here.model(batches()[0]), expected) > error_here + 6
    octavo.save(run, tmp_path / "run")
    restored = octavo.load(tmp_path / "run", Small(), sample=batches()[0])
    assert close(restored.model(batches()[0]), expected) > error_here + 6
    on_gpu = octavo.load(tmp_path / "run", Small(), sample=data[0], device="cuda")
    assert torch.equal(on_gpu.model(data[0]), expected)
    assert octavo.verify(tmp_path / "run", on_gpu, data).agrees
    if not EXPORTERS["modelopt"].problems(run.plan) and "rotate" not in {s.name for s in load_recipe(preset).steps}:
        out = octavo.export(run, tmp_path / "out")
        found = octavo.verify(out, run, data)
        assert found.agrees, found
    packed = octavo.lower(copy.deepcopy(run.model))
    assert torch.equal(packed(data[0]), expected)


@pytest.mark.parametrize("preset", NAMES)
@torch.no_grad()
def test_a_language_model_runs_there(preset: str) -> None:
    there = llama().cuda()
    reference = there(**tokens("cuda")[0]).logits
    run = octavo.quantize(there, preset, tokens("cuda"))
    here = octavo.quantize(llama(), preset, tokens("cpu"))
    error = close(llama()(**tokens("cpu")[0]).logits, here.model(**tokens("cpu")[0]).logits)
    assert close(reference, run.model(**tokens("cuda")[0]).logits) > error - 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["fp8-attention", "best:int8", "best:nvfp4", "best:int4-group"])
@torch.no_grad()
def test_half_precision_runs_there(preset: str, dtype: torch.dtype) -> None:
    there = llama().cuda().to(dtype)
    reference = there(**tokens("cuda")[0]).logits
    run = octavo.quantize(there, preset, tokens("cuda"))
    assert close(reference, run.model(**tokens("cuda")[0]).logits) > 8


@torch.no_grad()
def test_a_graph_is_written_from_there(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).cuda()
    data = [batch.cuda() for batch in batches()]
    run = octavo.quantize(model, "int8", data)
    out = octavo.export(run, tmp_path / "out", layout="onnx", sample=data[0])
    assert octavo.verify(out, run, data).agrees
