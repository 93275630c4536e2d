"""Attention of the model families that people have, by both kernels, and of torch's own transformer layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from nn.models import outputs
from octavo.nn.door import TorchDoor
from octavo.spec.facts import Slot
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SLOTS = ("query", "key", "value", "softmax", "attention_output")
COARSE = Recipe("coarse", ()).quantize("operation:attention", **dict.fromkeys(SLOTS, "int2-tensor"))
CACHES = Recipe("caches", ()).quantize("operation:attention", key_cache="int2-tensor", value_cache="int2-tensor")
Case = tuple[nn.Module, dict[str, Any], int]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape)


def clip(kernel: str) -> Case:
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59, "max_position_embeddings": 12}
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=8)
    batch = {"input_ids": ids(2, 7), "pixel_values": torch.randn(2, 3, 16, 16)}
    return CLIPModel._from_config(config, attn_implementation=kernel), batch, 4


def siglip(kernel: str) -> Case:
    """One of its attentions is an nn.MultiheadAttention: the pooling head of the vision tower."""
    from transformers import SiglipConfig, SiglipModel

    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12}
    config = SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8})
    batch = {"input_ids": ids(2, 7), "pixel_values": torch.randn(2, 3, 16, 16)}
    return SiglipModel._from_config(config, attn_implementation=kernel), batch, 5


def bert(kernel: str) -> Case:
    from transformers import BertConfig, BertModel

    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    batch = {"input_ids": ids(2, 9), "attention_mask": mask}
    return BertModel._from_config(BertConfig(**SMALL, vocab_size=60), attn_implementation=kernel), batch, 2


def vit(kernel: str) -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SMALL, image_size=16, patch_size=8)
    return ViTModel._from_config(config, attn_implementation=kernel), {"pixel_values": torch.randn(2, 3, 16, 16)}, 2


def llama(kernel: str) -> Case:
    """Four query heads over two key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SMALL, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=60)
    model = LlamaForCausalLM._from_config(config, attn_implementation=kernel)
    return model, {"input_ids": ids(2, 9), "use_cache": False}, 2


def gpt2(kernel: str) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel._from_config(config, attn_implementation=kernel)
    return model, {"input_ids": ids(2, 9), "use_cache": False}, 2


def whisper(kernel: str) -> Case:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=6, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 6, 20), "decoder_input_ids": ids(2, 5), "use_cache": False}
    return WhisperModel._from_config(config, attn_implementation=kernel), batch, 3


def t5(kernel: str) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    batch = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 5), "use_cache": False}
    return T5ForConditionalGeneration._from_config(config, attn_implementation=kernel), batch, 3


def swin(kernel: str) -> Case:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
    return SwinModel._from_config(config, attn_implementation=kernel), {"pixel_values": torch.randn(2, 3, 16, 16)}, 2


def deberta(kernel: str) -> Case:
    """Three products before its softmax, which it writes out whatever the kernel."""
    from transformers import DebertaV2Config, DebertaV2Model

    more = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return DebertaV2Model(DebertaV2Config(**SMALL, **more, vocab_size=60)), {"input_ids": ids(2, 9)}, 2


FAMILIES: dict[str, Callable[[str], Case]] = {
    make.__name__: make for make in (clip, siglip, bert, vit, llama, gpt2, whisper, t5, swin, deberta)
}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_kernel = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


def made(name: str, kernel: str) -> Case:
    torch.manual_seed(0)
    model, batch, count = FAMILIES[name](kernel)
    return model.eval(), batch, count


@every_kernel
@every_family
def test_every_attention_is_seen_and_each_of_its_quantizers_acts(name: str, kernel: str) -> None:
    model, batch, count = made(name, kernel)
    before = outputs(model, batch)
    run = octavo.quantize(model, COARSE, [batch])
    names = run.door.quantizer_names()
    assert len(names) == len(SLOTS) * count
    with run.door.disabled(lambda name: True):
        assert torch.allclose(outputs(model, batch), before, atol=1e-5)
    for quantizer in names:
        with run.door.disabled(lambda other, kept=quantizer: other != kept):
            changed = outputs(model, batch)
        assert not torch.allclose(changed, before, atol=1e-6), f"{quantizer} does nothing"
    octavo.strip(model)
    assert torch.equal(outputs(model, batch), before)


@every_family
def test_both_kernels_get_the_same_ranges(name: str) -> None:
    scales = []
    for kernel in ("sdpa", "eager"):
        model, batch, _ = made(name, kernel)
        run = octavo.quantize(model, load_recipe("fp8-attention"), [batch])
        scales.append(
            {q: run.model.get_submodule(q).scale for q in run.door.quantizer_names() if "bmm" in q and "(" not in q}
        )
    assert scales[0].keys() == scales[1].keys()
    for key, scale in scales[0].items():
        assert torch.allclose(scale, scales[1][key], rtol=1e-4), key


@every_family
def test_the_presets_leave_norms_alone(name: str) -> None:
    model, batch, _ = made(name, "sdpa")
    facts = TorchDoor(model, name, batch).facts()
    for preset in ("fp8", "fp8-attention", "fp8-dynamic", "int8", "int8-dynamic", "int8-weight-only"):
        plan = resolve(load_recipe(preset), facts)
        norms = [d for d in plan.decisions if d.site.operation == "norm"]
        assert norms
        assert all(not d.scheme and d.why for d in norms)


@pytest.mark.slow
@every_kernel
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deberta", "swin", "whisper"])
def test_attention_with_every_quantizer_compiles_into_one_graph(name: str, kernel: str) -> None:
    model, batch, _ = made(name, kernel)
    octavo.quantize(model, COARSE, [batch])
    simulated = outputs(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(outputs(compiled, batch), simulated)


@every_kernel
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_what_goes_into_a_cache_is_rounded_once(name: str, kernel: str) -> None:
    model, batch, _ = made(name, kernel)
    batch = {key: value for key, value in batch.items() if key != "use_cache"}
    run = octavo.quantize(model, CACHES, [batch])
    names = run.door.quantizer_names()
    assert len(names) == 4  # two layers, or an attention to itself and one to the encoder
    seen: dict[str, list[int]] = {name: [] for name in names}
    for quantizer in names:
        module = model.get_submodule(quantizer)
        module.register_forward_hook(lambda module, args, output: seen[module.name].append(args[0].shape[-2]))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = next(iter(batch.values()))
    model.generate(first, **options)
    num_prompt = 1 if name == "t5" else first.shape[1]
    for quantizer, lengths in seen.items():
        to_encoder = "EncDecAttention" in quantizer
        assert lengths == ([first.shape[1]] if to_encoder else [num_prompt, 1, 1, 1])


def test_caches_are_only_there_where_the_sample_uses_one() -> None:
    model, batch, _ = made("llama", "sdpa")
    plan = octavo.plan(model, "fp8-kv", sample={"input_ids": batch["input_ids"]})
    assert sum(Slot.KEY_CACHE in decision.scheme for decision in plan.decisions) == 2
    plan = octavo.plan(model, "fp8-kv", sample=batch)
    assert not any(Slot.KEY_CACHE in decision.scheme for decision in plan.decisions)


def test_a_rule_for_caches_says_when_the_sample_uses_none() -> None:
    model, batch, _ = made("llama", "sdpa")
    with pytest.raises(octavo.UserError, match=r"key_cache.*use_cache"):
        octavo.plan(model, CACHES, sample=batch)


def test_the_plan_says_that_fused_attention_is_written_out_for_its_softmax() -> None:
    plans = {
        kernel: octavo.plan(made("llama", kernel)[0], COARSE, sample=made("llama", kernel)[1])
        for kernel in ("sdpa", "eager")
    }
    assert any("2 attention calls" in warning and "written out" in warning for warning in plans["sdpa"].warnings)
    assert not plans["eager"].warnings


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_each_cache_quantizer_acts_and_static_caches_hold_the_same(name: str) -> None:
    model, batch, _ = made(name, "sdpa")
    batch = {key: value for key, value in batch.items() if key != "use_cache"}
    before = model(**batch).logits
    run = octavo.quantize(model, CACHES, [batch])
    for quantizer in run.door.quantizer_names():
        with run.door.disabled(lambda other, kept=quantizer: other != kept):
            assert not torch.equal(model(**batch).logits, before), f"{quantizer} does nothing"
    if name != "t5":
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        grown = model.generate(batch["input_ids"], **options)
        assert torch.equal(model.generate(batch["input_ids"], cache_implementation="static", **options), grown)


def encoder(batch_first: bool, **more: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, norm_first=False)
    return nn.TransformerEncoder(layer, 2, **more).eval()


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer_s_fast_path_is_not_taken(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = encoder(batch_first, enable_nested_tensor=False), torch.randn(2, 5, 16)
    with torch.inference_mode():
        fast = model(x)
    run = octavo.quantize(model, load_recipe("fp8-attention"), [x])
    assert len(run.door.quantizer_names()) == 2 * (4 + 2 * 4)  # attention; in_proj, out_proj, linear1, linear2
    with torch.inference_mode():
        assert not torch.allclose(model(x), fast)
        with run.door.disabled(lambda name: True):
            assert torch.allclose(model(x), fast, atol=1e-5)
    octavo.strip(model)
    with torch.inference_mode():
        assert torch.equal(model(x), fast)


def test_nested_tensors_of_padded_batches_are_not_made() -> None:
    torch.manual_seed(0)
    model, x = encoder(True, enable_nested_tensor=True), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": x, "src_key_padding_mask": padding}
    with torch.no_grad():
        expected = model(**batch)
    run = octavo.quantize(model, load_recipe("fp8-attention"), [batch])
    with torch.no_grad(), run.door.disabled(lambda name: True):
        found = model(**batch)
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_s_two_attentions_are_quantized(norm_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True, norm_first=norm_first).eval()
    batch = (torch.randn(2, 6, 16), torch.randn(2, 5, 16))
    with torch.no_grad():
        expected = model(*batch)
    run = octavo.quantize(model, load_recipe("fp8-attention"), [batch])
    assert len([q for q in run.door.quantizer_names() if "bmm" in q]) == 3 * 4
    with torch.no_grad():
        assert not torch.equal(model(*batch), expected)
        with run.door.disabled(lambda name: True):
            assert torch.allclose(model(*batch), expected, atol=1e-5)


def test_masks_reach_the_decoder_as_before() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    batch = {"tgt": torch.randn(2, 5, 16), "memory": torch.randn(2, 6, 16), "tgt_mask": mask, "tgt_is_causal": True}
    batch["memory_key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        expected = model(**batch)
    door = TorchDoor(model, "decoder", batch)
    door.prepare(resolve(load_recipe("fp8-attention"), door.facts()))
    with torch.no_grad():
        assert torch.allclose(model(**batch), expected, atol=1e-5)
