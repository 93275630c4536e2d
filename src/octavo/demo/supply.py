"""Training batches, drawn by a worker process while the model learns."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from octavo.demo.architecture import DEVIATION, MEAN
from octavo.demo.pictures import draw_all
from octavo.demo.sampling import Split
from octavo.demo.streams import described_families, described_scenes


class DrawnBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batch ``step`` of the training of ``seed``: pictures ``(batch, height, width, 3)``, uint8, and tokens
    ``(batch, tokens)``. It depends on nothing else, so training resumes at any step.

    From step ``families_from`` on, the scenes come in families whose members differ in little.
    """

    def __init__(self, tokenizer: CLIPTokenizer, *, seed: int, batch_size: int, families_from: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._batch_size = batch_size
        self._families_from = families_from

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        stream = described_families if step >= self._families_from else described_scenes
        described = stream(Split.TRAINING, f"seed {self._seed}, batch {step}")
        pairs = [next(described) for _ in range(self._batch_size)]
        tokens = self._tokenizer([words for _, words in pairs], padding=True, return_tensors="pt")
        return torch.from_numpy(draw_all([scene for scene, _ in pairs])), tokens["input_ids"]


def supply(batches: DrawnBatches, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``steps`` in order, a few of them ahead."""
    return iter(DataLoader(batches, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=4))


def to_pixel_values(images: Tensor | np.ndarray) -> Tensor:
    """``(batch, height, width, 3)`` bytes -> ``(batch, 3, height, width)``, float32, as the image processor does."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    return (pixels / 255 - MEAN) / DEVIATION
