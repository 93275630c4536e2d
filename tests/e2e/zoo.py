"""Small models with random weights, of every kind people have, and data for them, saved as people save them.

Nothing is shared with the models that the parts were written against: other classes, odd sizes, tokenizers of the
models' own kinds trained on a page of prose.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

PROSE = """
A quarto is a sheet folded twice, so that it makes four leaves or eight pages. An octavo is folded three times.
Printers set the pages so that after folding they follow each other in the right order.
The binder gathers the sheets, sews them through the fold, and cuts the edges.
Old books were sold unbound; the owner chose the leather, the boards and the gilding.
Paper was made of rags, one sheet at a time, and the mould left lines that are seen against the light.
A watermark tells the mill; the chain lines tell how the sheet was folded.
Ink for printing is thick and oily, because thin ink would run from the metal type.
The compositor picked letters from two cases: the upper for capitals, the lower for the rest.
A good pressman pulled two hundred and fifty impressions in an hour.
Errors found while the press was running were mended, and both states of the sheet were sold.
"""
SENTENCES = [line.strip() for line in PROSE.strip().splitlines()]
WORDS = sorted({word.strip(".,;:").lower() for word in PROSE.split()})
SHAPES = ("tall leaf", "broad leaf", "round seal")


def phrases(count: int, seed: int, words: int = 6) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(3, words))) for _ in range(count)]


# tokenizers


def byte_pairs(size: int = 420, *, start: str = "<s>", end: str = "</s>", frames: bool = True) -> Any:
    """GPT-2's kind of tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(dict.fromkeys([start, end]))
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    built.train_from_iterator(SENTENCES, trainer)
    if frames:
        pieces = [(token, built.token_to_id(token)) for token in special]
        built.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=pieces)
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token=start, eos_token=end)


def word_pieces(directory: Path) -> Any:
    """BERT's kind of tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(SENTENCES, vocab_size=300, min_frequency=1)
    directory.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(directory))
    return BertTokenizerFast(vocab=str(directory / "vocab.txt"))


# models


def save(model: Any, directory: Path, *parts: Any) -> Path:
    for part in (model, *parts):
        part.save_pretrained(directory)
    return directory


def clip(directory: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = byte_pairs(start="<|startoftext|>", end="<|endoftext|>")
    tokenizer.pad_token = "<|endoftext|>"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    text = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 5}
    config = CLIPConfig(
        text_config={**text, **ids, "max_position_embeddings": 40},
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        projection_dim=20,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return save(CLIPModel(config), directory, CLIPProcessor(pictures, tokenizer))


def siglip(directory: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = byte_pairs()
    tokenizer.pad_token = "</s>"
    tokenizer.model_max_length = 16
    text = {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 5}
    vision = {"hidden_size": 30, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**vision, "image_size": 24, "patch_size": 8},
    )
    return save(SiglipModel(config), directory, tokenizer, SiglipImageProcessorPil(size={"height": 24, "width": 24}))


def bert(directory: Path) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = word_pieces(directory)
    sizes = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=48)
    return save(BertModel(config), directory, tokenizer)


def sentence_encoder(directory: Path) -> Path:
    """A sentence-transformers directory, laid out as its third version writes it: first token, dense, normalize."""
    from safetensors.torch import save_file
    from transformers import DistilBertConfig, DistilBertModel

    tokenizer = word_pieces(directory)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=28, hidden_dim=60, n_layers=2, n_heads=4, max_position_embeddings=40
    )
    save(DistilBertModel(config), directory, tokenizer)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts.items())
    ]
    for path in parts:
        (directory / path).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 28, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    dense = {"in_features": 28, "out_features": 12, "bias": True}
    dense |= {"activation_function": "torch.nn.modules.activation.Tanh"}
    written: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "find: "}, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": pooling,
        "2_Dense/config.json": dense,
    }
    for name, value in written.items():
        (directory / name).write_text(json.dumps(value))
    weights = {"linear.weight": torch.randn(12, 28), "linear.bias": torch.zeros(12)}
    save_file(weights, directory / "2_Dense" / "model.safetensors")
    return directory


def vit(directory: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = {name: i for i, name in enumerate(SHAPES)}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(
        **sizes, image_size=24, patch_size=6, label2id=names, id2label={i: name for name, i in names.items()}
    )
    pictures = ViTImageProcessorPil(size={"height": 24, "width": 24})
    return save(ViTForImageClassification(config), directory, pictures)


def resnet(directory: Path) -> Path:
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    names = {name: i for i, name in enumerate(SHAPES)}
    config = ResNetConfig(
        embedding_size=12,
        hidden_sizes=[20, 36],
        depths=[1, 2],
        layer_type="bottleneck",
        label2id=names,
        id2label={i: name for name, i in names.items()},
    )
    pictures = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.9)
    return save(ResNetForImageClassification(config), directory, pictures)


def llama(directory: Path, *, tied: bool = False) -> Path:
    """Four query heads over two key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_pairs(frames=False)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save(LlamaForCausalLM(config), directory, tokenizer)


def llama_tied(directory: Path) -> Path:
    return llama(directory, tied=True)


def gpt2(directory: Path) -> Path:
    """transformers' Conv1D, and embeddings tied to the head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_pairs(start="<|endoftext|>", end="<|endoftext|>", frames=False)
    config = GPT2Config(
        n_embd=30, n_layer=2, n_head=3, n_positions=56, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    return save(GPT2LMHeadModel(config), directory, tokenizer)


def bart(directory: Path) -> Path:
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = byte_pairs()
    tokenizer.pad_token = "</s>"
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
    config = BartConfig(
        d_model=24,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        **layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    return save(BartForConditionalGeneration(config), directory, tokenizer)


def t5(directory: Path) -> Path:
    """Gated feed-forward and a head of its own, as in version 1.1."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = byte_pairs(frames=False)
    tokenizer.pad_token = "<s>"
    sizes = {"d_model": 20, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 3}
    config = T5Config(
        **sizes,
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return save(T5ForConditionalGeneration(config), directory, tokenizer)


MODULE = '''
"""A user's own network, nothing of transformers in it."""
import torch
from torch import nn


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(5, 18, kernel_size=3, padding=1)
        self.mix = nn.MultiheadAttention(18, 3, batch_first=True)
        self.norm = nn.LayerNorm(18)
        self.up = nn.Linear(18, 50)
        self.down = nn.Linear(50, 7, bias=False)

    def forward(self, signal, gain):
        x = self.stem(signal).transpose(1, 2) * gain
        x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
        return self.down(torch.relu(self.up(x))).mean(dim=1)


def build():
    torch.manual_seed(11)
    return Tower()


def signals():
    dice = torch.Generator().manual_seed(12)
    return [(torch.randn(4, 5, 9, generator=dice), torch.rand(4, 1, 1, generator=dice)) for _ in range(6)]
'''


# data


def pairs_of_text(path: Path, count: int = 12, seed: int = 1) -> Path:
    rows = [{"query": " ".join(text.split()[:2]), "document": text} for text in phrases(count, seed, words=9)]
    return _json_lines(path, rows)


def texts(path: Path, count: int = 12, seed: int = 2) -> Path:
    return _json_lines(path, [{"text": text} for text in phrases(count, seed)])


def prose(path: Path) -> Path:
    path.write_text(PROSE * 2)
    return path


def captions(directory: Path, count: int = 10, seed: int = 3) -> Path:
    rows = []
    for i, text in enumerate(phrases(count, seed)):
        _picture(directory / f"plate-{i}.png", seed + i)
        rows.append({"image": f"plate-{i}.png", "text": text})
    return _json_lines(directory / "plates.jsonl", rows)


def picture_folders(directory: Path, each: int = 3) -> Path:
    for c, name in enumerate(SHAPES):
        for i in range(each):
            _picture(directory / name / f"{i}.png", 50 * c + i)
    return directory


def _json_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _picture(path: Path, seed: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    width, height = dice.randint(20, 40), dice.randint(20, 40)
    Image.frombytes("RGB", (width, height), dice.randbytes(3 * width * height)).save(path)
