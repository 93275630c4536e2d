"""The demo model before training: a CLIP in small, its tokenizer and its image processor."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from octavo.demo.captions import vocabulary
from octavo.demo.pictures import SIZE

HIDDEN_SIZE = 128
PROJECTION_DIM = 128
HEAD_DIM = 32
PATCH_SIZE = 8
NUM_VISION_LAYERS = 6
NUM_TEXT_LAYERS = 4
MAX_TOKENS = 24
MEAN = 0.5
DEVIATION = 0.25

_WORD_END = "</w>"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The model with random weights, from torch's global seed."""
    tower = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 4 * HIDDEN_SIZE,
        "num_attention_heads": HIDDEN_SIZE // HEAD_DIM,
        "projection_dim": PROJECTION_DIM,
        "hidden_act": "gelu",
    }
    text = {
        "num_hidden_layers": NUM_TEXT_LAYERS,
        "max_position_embeddings": MAX_TOKENS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": NUM_VISION_LAYERS, "image_size": SIZE, "patch_size": PATCH_SIZE}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=PROJECTION_DIM))


def build_tokenizer() -> CLIPTokenizer:
    """Byte pairs as in CLIP: each word of a caption is one token, any other text falls into its bytes."""
    merges = _learn_merges(vocabulary())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges), _BOS, _EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)  # type: ignore[arg-type]


def build_image_processor() -> CLIPImageProcessor:
    """Resizes, crops, and brings bytes to zero mean and a deviation of about one."""
    return CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )


def save_directory(model: CLIPModel, tokenizer: CLIPTokenizer, path: Path) -> None:
    """Writes all that ``AutoModel`` and ``AutoProcessor`` read: weights in half precision, to be loaded in single."""
    model.save_pretrained(path, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    (path / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(path)
    build_image_processor().save_pretrained(path)


def _learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """The merges, in order, that make one token of each of ``words``.

    Byte-pair encoding (Sennrich et al., arXiv:1508.07909). The trainer of ``tokenizers`` breaks ties at random; here
    the first pair in the alphabet wins, so that every process numbers its tokens alike.
    """
    split_words: list[tuple[str, ...]] = [(*word[:-1], word[-1] + _WORD_END) for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split_words for pair in pairwise(parts)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        split_words = [_merge(parts, merges[-1]) for parts in split_words]
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """``parts`` with each ``pair`` of neighbours made one, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)
