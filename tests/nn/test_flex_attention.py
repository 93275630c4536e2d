"""transformers' interface to torch's flex attention, which has no backward pass on a CPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import octavo

SLOTS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "bmm2_output_quantizer")


@pytest.mark.slow
@torch.no_grad()
def test_each_of_the_four_quantizers_changes_the_output():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flex_attention").eval()
    batch = {"input_ids": torch.randint(0, 100, (2, 128))}
    original = model(**batch).logits
    run = octavo.quantize(model, "fp8-attention", [batch])
    for slot in SLOTS:
        with run.door.disabled(lambda name, slot=slot: not name.endswith(slot)):
            assert not torch.equal(model(**batch).logits, original)
    octavo.strip(model)
    assert torch.equal(model(**batch).logits, original)
