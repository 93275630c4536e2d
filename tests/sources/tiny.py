"""Tiny models of every kind, with random weights and tokenizers of a few words, saved as users have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

_SENTENCE = (
    "a photo picture image of the red green blue cat dog bird car tree house small large is on in and "
    "under sits runs sees near old new two one three it was not never always here there who what ."
)
WORDS = tuple(_SENTENCE.split())
CLASSES = ("blue_cat", "green_dog", "red_car")


def tokenizer(**special: str):
    """A word tokenizer of transformers: <s> words </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=built, **{k: v for k, v in names.items() if v})


VOCABULARY = len(WORDS) + 4
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 24}
_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 16, "patch_size": 8}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _image_processor():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def save(model, directory: Path, *parts) -> Path:
    for part in (model, *parts):
        part.save_pretrained(directory)
    return directory


def clip(directory: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(text_config=_TEXT | _IDS, vision_config=_VISION, projection_dim=12)
    return save(CLIPModel(config), directory, tokenizer(), _image_processor())


def siglip(directory: Path) -> Path:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    config = SiglipConfig(text_config=_TEXT | _IDS, vision_config=_VISION)
    return save(SiglipModel(config), directory, tokenizer(), _image_processor())


def bert(directory: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return save(BertModel(BertConfig(**_TEXT, pad_token_id=0)), directory, tokenizer())


def sentence_bert(directory: Path, **pooling: object) -> Path:
    """As sentence-transformers saves: an encoder, pooling, normalization."""
    bert(directory)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    prefix = "sentence_transformers.models."
    listed = [{"idx": i, "name": str(i), "path": p, "type": prefix + t} for i, (p, t) in enumerate(modules)]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    (directory / "1_Pooling").mkdir()
    (directory / "2_Normalize").mkdir()
    settings = {"word_embedding_dimension": 16, **(pooling or {"pooling_mode_mean_tokens": True})}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return directory


def masked_lm(directory: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return save(BertForMaskedLM(BertConfig(**_TEXT, pad_token_id=0)), directory, tokenizer())


def text_classifier(directory: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = BertConfig(**_TEXT, pad_token_id=0, **labels)
    return save(BertForSequenceClassification(config), directory, tokenizer())


def vit_classifier(directory: Path, labels: tuple[str, ...] = ("red car", "green dog, hound", "blue cat")) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return save(ViTForImageClassification(ViTConfig(**_VISION, **names)), directory, _image_processor())


def vit(directory: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return save(ViTModel(ViTConfig(**_VISION)), directory, _image_processor())


def llama(directory: Path, **special: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**_TEXT, **_IDS)), directory, tokenizer(**special))


def t5(directory: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    return save(T5ForConditionalGeneration(config), directory, tokenizer())


def sentence(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words))


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sentence(rng, int(rng.integers(3, 12))) for _ in range(count)]


def write_image(path: Path, seed: int) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_folder(directory: Path, per_class: int = 3) -> Path:
    for c, name in enumerate(CLASSES):
        for i in range(per_class):
            write_image(directory / name / f"{i}.png", seed=100 * c + i)
    return directory


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(directory: Path, count: int = 8) -> Path:
    """JSON lines of pictures and captions."""
    rows = []
    for i, text in enumerate(sentences(count)):
        write_image(directory / "images" / f"{i}.png", seed=i)
        rows.append({"image": f"images/{i}.png", "text": text})
    return json_lines(directory / "pairs.jsonl", rows)
