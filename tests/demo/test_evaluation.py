"""The model is good but not perfect, so that quantization has something to lose."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from octavo.demo import MODEL_DIR, tasks
from octavo.demo.evaluation import embed_images, embed_texts, evaluate_directory, retrieval_hits, zero_shot_hits
from octavo.demo.supply import to_pixel_values

WINDOWS = {
    "shapes-100 top-1": (85, 98),
    "shapes-1k top-1": (40, 95),
    "scenes caption R@1": (40, 85),
    "scenes picture R@1": (40, 85),
}


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@torch.no_grad()
def test_scores_are_those_of_the_model(model, tokenizer):
    pairs = tasks.calibration_pairs(16)
    tokens = tokenizer(pairs.captions, padding=True, return_tensors="pt")
    expected = model(pixel_values=to_pixel_values(pairs.images), **tokens).logits_per_image
    scores = embed_images(model, pairs.images) @ embed_texts(model, tokenizer, pairs.captions).T
    torch.testing.assert_close(scores * model.logit_scale.exp(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_of_shapes_100_is_in_its_window(model, tokenizer):
    data = tasks.shapes_100()
    part = dataclasses.replace(data, images=data.images[::5], labels=data.labels[::5])
    assert 0.80 <= zero_shot_hits(model, tokenizer, part).double().mean() <= 0.99


@torch.no_grad()
def test_retrieval_counts_the_own_pair(model, tokenizer):
    pairs = tasks.calibration_pairs(64)
    shuffled = dataclasses.replace(pairs, captions=list(np.roll(pairs.captions, 1)))
    for right, wrong in zip(
        retrieval_hits(model, tokenizer, pairs), retrieval_hits(model, tokenizer, shuffled), strict=True
    ):
        assert right.double().mean() > 0.5
        assert wrong.double().mean() < 0.2


@pytest.fixture(scope="module")
def metrics():
    return evaluate_directory(MODEL_DIR)


@pytest.mark.slow
@pytest.mark.parametrize("metric", WINDOWS)
def test_every_metric_is_in_its_window(metrics, metric):
    low, high = WINDOWS[metric]
    assert low <= metrics[metric]["value"] <= high
