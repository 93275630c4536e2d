"""What the demo model is worth: top-1 on the two zero-shot tasks, R@1 in both directions on the scenes."""

from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from octavo.demo import tasks
from octavo.demo.supply import to_pixel_values

_BATCH_SIZE = 250


def evaluate_directory(path: Path) -> dict[str, dict[str, float]]:
    """Metric -> its value and its standard error, in percent, for the model in ``path``, in float32."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return evaluate(model, CLIPTokenizer.from_pretrained(path))


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, dict[str, float]]:
    """Metric -> its value and its standard error, in percent."""
    hits = {
        "shapes-100 top-1": zero_shot_hits(model, tokenizer, tasks.shapes_100()),
        "shapes-1k top-1": zero_shot_hits(model, tokenizer, tasks.shapes_1k()),
    }
    hits["scenes caption R@1"], hits["scenes picture R@1"] = retrieval_hits(model, tokenizer, tasks.scenes())
    return {metric: _in_percent(hit) for metric, hit in hits.items()}


def zero_shot_hits(model: CLIPModel, tokenizer: CLIPTokenizer, data: tasks.ZeroShotData) -> Tensor:
    """``(num_pictures,)``, bool: was the class found? The mean of a class's prompts stands for it."""
    classes = torch.stack(
        [
            embed_texts(model, tokenizer, [template.format(name) for name in data.class_names])
            for template in data.templates
        ]
    )
    scores = embed_images(model, data.images) @ normalize(classes.mean(dim=0)).T
    return scores.argmax(dim=1) == torch.from_numpy(data.labels)


def retrieval_hits(model: CLIPModel, tokenizer: CLIPTokenizer, pairs: tasks.Pairs) -> tuple[Tensor, Tensor]:
    """Twice ``(num_pairs,)``, bool: was the picture's caption found, was the caption's picture found?"""
    scores = embed_images(model, pairs.images) @ embed_texts(model, tokenizer, pairs.captions).T
    own = torch.arange(len(scores))
    return scores.argmax(dim=1) == own, scores.argmax(dim=0) == own


def embed_images(model: CLIPModel, images: np.ndarray) -> Tensor:
    """``(num_images, projection_dim)``, of length one."""
    parts = (images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE))
    return torch.cat([normalize(model.get_image_features(to_pixel_values(part)).pooler_output) for part in parts])


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """``(num_texts, projection_dim)``, of length one."""
    return torch.cat([normalize(part) for part in _text_features(model, tokenizer, texts)])


def _text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Iterator[Tensor]:
    for start in range(0, len(texts), _BATCH_SIZE):
        tokens = tokenizer(texts[start : start + _BATCH_SIZE], padding=True, return_tensors="pt")
        yield model.get_text_features(**tokens).pooler_output


def _in_percent(hits: Tensor) -> dict[str, float]:
    share = hits.double().mean().item()
    return {"value": 100 * share, "standard_error": 100 * sqrt(share * (1 - share) / len(hits))}
