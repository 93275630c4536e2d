"""The model directory is an ordinary one: transformers reads it, and nothing in it is ours."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

from octavo.demo import MODEL_DIR
from octavo.demo.captions import vocabulary
from octavo.demo.supply import to_pixel_values
from octavo.demo.tasks import calibration_pairs, scenes


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL_DIR)


def test_it_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sum(sizes.values()) <= 8e6
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }


def test_it_is_a_true_clip(model):
    assert type(model) is CLIPModel
    assert model.dtype == torch.float32
    for tower in (model.config.text_config, model.config.vision_config):
        assert tower.num_hidden_layers >= 4
        assert tower.num_attention_heads >= 4
        assert tower.hidden_size // tower.num_attention_heads >= 32
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def test_the_processor_is_the_ordinary_one(processor):
    assert type(processor) is CLIPProcessor


def test_training_saw_what_the_processor_makes(processor):
    images = calibration_pairs(4).images
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_pixel_values(images), pixels, rtol=0, atol=1e-5)


def test_every_word_is_one_token(processor):
    assert all(len(processor.tokenizer.tokenize(word)) == 1 for word in vocabulary())


def test_other_text_falls_into_bytes_and_never_ends_early(processor):
    tokens = processor.tokenizer("zebra, 7 ünïcorns")["input_ids"]
    assert tokens.count(processor.tokenizer.eos_token_id) == 1
    assert processor.tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "zebra,7ünïcorns"


def test_captions_fit(processor, model):
    tokens = processor.tokenizer(scenes().captions)["input_ids"]
    assert max(map(len, tokens)) <= model.config.text_config.max_position_embeddings


@torch.no_grad()
def test_the_caption_is_read_at_its_end_whatever_the_padding(processor, model):
    text = "a small red striped circle left of a large blue star"
    alone = processor.tokenizer([text], return_tensors="pt")
    padded = processor.tokenizer([text], return_tensors="pt", padding="max_length")
    assert padded["input_ids"].shape[1] == model.config.text_config.max_position_embeddings
    torch.testing.assert_close(
        model.get_text_features(**alone).pooler_output, model.get_text_features(**padded).pooler_output
    )
    other = processor.tokenizer([text.replace("star", "ring")], return_tensors="pt")
    distance = model.get_text_features(**alone).pooler_output - model.get_text_features(**other).pooler_output
    assert distance.abs().max() > 0.01


def test_a_tokenizer_loads_alone(processor):
    assert AutoTokenizer.from_pretrained(MODEL_DIR).get_vocab() == processor.tokenizer.get_vocab()


def test_the_log_ends_with_the_metrics():
    lines = [json.loads(line) for line in (MODEL_DIR / "training_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert len(lines) > 50
    assert lines[-1]["shapes-100 top-1"] > 0
    assert np.mean([line["loss"] for line in lines[-11:-1]]) < 0.5 * lines[0]["loss"]
