"""The demo language model before training: a Llama in small."""

from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
NUM_LAYERS = 6
NUM_HEADS = 8
NUM_KEY_VALUE_HEADS = 4


def build_model(vocabulary_size: int, end_of_text: int) -> LlamaForCausalLM:
    """The model with random weights, from torch's global seed."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)
