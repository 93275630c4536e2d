"""Checkpoints that are quantized already: opened as codes times their scales, exactly, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from octavo.errors import UserError
from octavo.sources import open_model
from zoo.table import made

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def saved(name: str, directory: Path) -> dict[str, Tensor]:
    """A model of the zoo in ``directory``, and its tensors."""
    model, _ = made(name)
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def stored(directory: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> None:
    """Other tensors in their place, and how ``config.json`` says they are quantized."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


def fp8_blocks(directory: Path) -> dict[str, Tensor]:
    """Llama as DeepSeek writes it: E4M3 codes and one fp32 factor for each block; what they mean is returned."""
    tensors, meaning = saved("llama", directory), {}
    for key in [key for key in tensors if key.split(".")[-2] in PROJECTIONS]:
        weight = tensors.pop(key)
        tiles = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meaning[key] = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
        tensors |= {key: codes.flatten(2).flatten(0, 1), f"{key}_scale_inv": scale}
    stored(directory, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]})
    return meaning


def mxfp4(directory: Path) -> dict[str, Tensor]:
    """GPT-OSS as it was released: two E2M1 codes in a byte, an exponent for 32 of them, outputs first."""
    tensors, meaning = saved("gpt_oss", directory), {}
    rng = np.random.default_rng(0)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, num_in, num_out = tensors.pop(key).shape
        codes = rng.integers(0, 16, (experts, num_out, num_in // 32, 32), dtype=np.uint8)
        exponents = rng.integers(120, 128, codes.shape[:3], dtype=np.uint8)
        real = values[codes] * np.exp2(exponents.astype(np.float32) - 127)[..., None]
        meaning[key] = torch.from_numpy(real).flatten(2).transpose(1, 2)
        blocks = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors |= {f"{key}_blocks": torch.from_numpy(blocks), f"{key}_scales": torch.from_numpy(exponents)}
    stored(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return meaning


def compressed(directory: Path) -> dict[str, Tensor]:
    """Llama in compressed-tensors' packed INT4 in groups of 16."""
    tensors, meaning = saved("llama", directory), {}
    for key in [key for key in tensors if key.split(".")[-2] in PROJECTIONS]:
        weight = tensors.pop(key)
        groups = weight.unflatten(1, (-1, 16))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scale).round()
        meaning[key] = (codes * scale).flatten(1)
        unsigned = (codes.flatten(1).int() + 8).unflatten(1, (-1, 8))
        packed = sum(unsigned[..., k] << (4 * k) for k in range(8))
        tensors |= {f"{key}_packed": packed.int(), f"{key}_scale": scale.squeeze(-1)}
        tensors[f"{key}_shape"] = torch.tensor(weight.shape)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    stored(directory, tensors, {**section, "config_groups": {"group_0": group}, "ignore": ["lm_head"]})
    return meaning


@pytest.mark.parametrize("write", [fp8_blocks, mxfp4, compressed])
def test_a_weight_is_its_codes_times_their_scales(write: Any, tmp_path: Path) -> None:
    meaning = write(tmp_path)
    loaded = open_model(tmp_path)
    state = loaded.model.state_dict()
    assert meaning
    for key, real in meaning.items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], real), key
    assert "quantization_config" not in vars(loaded.config)


def test_a_run_of_such_a_checkpoint_says_nothing_of_its_first_codes(tmp_path: Path) -> None:
    fp8_blocks(tmp_path / "model")
    run = octavo.quantize(open_model(tmp_path / "model"), "int8-weight-only")
    octavo.save(run, tmp_path / "run")
    assert "quantization_config" not in json.loads((tmp_path / "run" / "config.json").read_text())
    again = octavo.load(tmp_path / "run")
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(again.model(tokens).logits, run.model(tokens).logits)


def test_others_are_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = saved("llama", tmp_path)
    stored(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match=r"already quantized \(bitsandbytes\).*opens fp8, mxfp8, mxfp4, compressed-t"):
        open_model(tmp_path)
