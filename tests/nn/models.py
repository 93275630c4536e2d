"""Tiny models of the kinds that people have, each with one batch. Random weights, fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, Any]


class DirectAttention(nn.Module):
    """Calls fused attention itself, once through a helper function and once with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = helped(q, k, v)
        y = y + F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def helped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A free function between the module and the call."""
    return F.scaled_dot_product_attention(q, k, v)


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape)


def clip(attention: str = "sdpa") -> Case:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    text = {**tower, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "max_position_embeddings": 20}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = CLIPModel._from_config(config, attn_implementation=attention)
    return model, {"input_ids": _ids(3, 10), "pixel_values": torch.randn(3, 3, 32, 32)}


def clip_eager() -> Case:
    return clip("eager")


def bert() -> Case:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(**sizes, vocab_size=100)), {"input_ids": _ids(2, 9)}


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=128, vocab_size=100, tie_word_embeddings=True)
    return LlamaForCausalLM(config), {"input_ids": _ids(2, 9), "use_cache": False}


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), {"input_ids": _ids(2, 9), "use_cache": False}


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)), {
        "pixel_values": torch.randn(2, 3, 32, 32)
    }


def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 7, 32)


def convolutions() -> Case:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 3),
        nn.ConvTranspose1d(6, 4, 2),
    )
    return model, torch.randn(2, 4, 9, 9)


def direct() -> Case:
    return DirectAttention(), torch.randn(2, 7, 32)


ZOO: dict[str, Callable[[], Case]] = {
    make.__name__: make for make in (clip, clip_eager, bert, llama, gpt2, vit, torch_encoder, convolutions, direct)
}


def made(name: str) -> Case:
    """A model of ``ZOO`` in evaluation mode, with its batch."""
    torch.manual_seed(0)
    model, batch = ZOO[name]()
    return model.eval(), batch


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Everything floating that the model returns, as one vector; torch's fused layers are not taken."""
    from octavo.numerics.arrays import tensors_in

    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    return torch.cat([t.flatten().float() for t in tensors_in(result)])
