"""Language models of transformers: decoders, encoders, encoder-decoders, experts, state spaces."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from zoo.made import Case, ids

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def causal(family: str, **sizes: Any) -> Case:
    """A causal language model: ``<family>Config`` and ``<family>ForCausalLM``."""
    config = getattr(hf, f"{family}Config")(**{**IDS, **sizes})
    return getattr(hf, f"{family}ForCausalLM")(config), {"input_ids": ids(2, 9), "use_cache": False}


def encoder(family: str, **sizes: Any) -> Case:
    """A text encoder, one text of the batch padded."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    config = getattr(hf, f"{family}Config")(**{**IDS, **sizes})
    return getattr(hf, f"{family}Model")(config), {"input_ids": ids(2, 9), "attention_mask": mask}


def seq2seq(family: str, **sizes: Any) -> Case:
    """An encoder-decoder with different lengths on its two sides."""
    config = getattr(hf, f"{family}Config")(**{**IDS, "decoder_start_token_id": 1, **sizes})
    batch = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 5), "use_cache": False}
    return getattr(hf, f"{family}ForConditionalGeneration")(config), batch


def llama() -> Case:
    return causal("Llama", **GROUPED, tie_word_embeddings=True)


def qwen3() -> Case:
    return causal("Qwen3", **GROUPED, head_dim=8)


def gemma() -> Case:
    return causal("Gemma", **GROUPED, head_dim=8)


def gemma2() -> Case:
    return causal("Gemma2", **GROUPED, head_dim=8, sliding_window=4)


def mistral() -> Case:
    return causal("Mistral", **GROUPED, sliding_window=4)


def phi() -> Case:
    return causal("Phi", **SMALL)


def phi3() -> Case:
    return causal("Phi3", **GROUPED)


def gpt2() -> Case:
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": ids(2, 9), "use_cache": False}


def gpt_neox() -> Case:
    return causal("GPTNeoX", **SMALL)


def falcon() -> Case:
    return causal("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


def opt() -> Case:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    return causal("OPT", **sizes, vocab_size=64, max_position_embeddings=16, word_embed_proj_dim=16)


def bloom() -> Case:
    return causal("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=64)


def mpt() -> Case:
    return causal("Mpt", d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, vocab_size=64, max_seq_len=16)


def granite() -> Case:
    return causal("Granite", **GROUPED)


def olmo2() -> Case:
    return causal("Olmo2", **GROUPED)


def deepseek_v3() -> Case:
    sizes = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    return causal("DeepseekV3", **SMALL, **sizes, **experts, moe_intermediate_size=16, first_k_dense_replace=1)


def mixtral() -> Case:
    return causal("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


def qwen3_moe() -> Case:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return causal("Qwen3Moe", **GROUPED, **experts, head_dim=8)


def qwen2_moe() -> Case:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return causal("Qwen2Moe", **GROUPED, **experts, shared_expert_intermediate_size=24)


def gpt_oss() -> Case:
    sizes = {**GROUPED, "intermediate_size": 64, "head_dim": 8, "sliding_window": 4}
    return causal("GptOss", **sizes, num_local_experts=4, num_experts_per_tok=2)


def llama4() -> Case:
    sizes = {**GROUPED, "intermediate_size": 24, "intermediate_size_mlp": 48, "head_dim": 8}
    config = hf.Llama4TextConfig(
        **IDS, **sizes, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2
    )
    return hf.Llama4ForCausalLM(config), {"input_ids": ids(2, 9), "use_cache": False}


def olmoe() -> Case:
    return causal("Olmoe", **GROUPED, num_experts=4, num_experts_per_tok=2)


def granite_moe() -> Case:
    return causal("GraniteMoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


def jamba() -> Case:
    mamba = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return causal("Jamba", **GROUPED, **mamba, **layers, num_experts=4, num_experts_per_tok=2)


def mamba() -> Case:
    return causal("Mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4, time_step_rank=4)


def mamba2() -> Case:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, "head_dim": 8}
    return causal("Mamba2", **sizes, num_heads=8, n_groups=2, chunk_size=4)


def bert() -> Case:
    return encoder("Bert", **SMALL)


def deberta() -> Case:
    return encoder("DebertaV2", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)


def modernbert() -> Case:
    return encoder("ModernBert", **SMALL, global_attn_every_n_layers=2, local_attention=4)


def t5() -> Case:
    return seq2seq("T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)


def bart() -> Case:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16}
    return seq2seq("Bart", d_model=32, vocab_size=64, **layers, **sizes)


def whisper() -> Case:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_mel_bins=6,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10,
        max_target_positions=12, decoder_start_token_id=1, **IDS,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 6, 20), "decoder_input_ids": ids(2, 5), "use_cache": False}
    return hf.WhisperForConditionalGeneration(config), batch


def wav2vec2() -> Case:
    sizes = {**SMALL, "conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
    config = hf.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return hf.Wav2Vec2Model(config), {"input_values": torch.randn(2, 120)}


LANGUAGE = (
    llama, qwen3, gemma, gemma2, mistral, phi, phi3, gpt2, gpt_neox, falcon, opt, bloom, mpt, granite, olmo2,
    deepseek_v3, mixtral, qwen3_moe, qwen2_moe, gpt_oss, llama4, olmoe, granite_moe, jamba, mamba, mamba2, bert,
    deberta, modernbert, t5, bart, whisper, wav2vec2,
)  # fmt: skip
