"""Runs a model over many samples, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources import LoadedModel, Sample, embed_images, embed_texts, image_inputs, text_inputs


@dataclass(frozen=True, slots=True)
class Options:
    """How a task runs its model.

    ``max_length`` cuts texts, and is the window of perplexity; None means the model's own. ``stride`` is how far the
    windows of perplexity are apart; None means as far as they are long.
    """

    batch_size: int = 32
    max_length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        numbers = {"batch size": self.batch_size, "max length": self.max_length, "stride": self.stride}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"the {name} is {value}, and at least 1 is needed")


def embed_all_texts(loaded: LoadedModel, texts: Sequence[str], options: Options, *, role: str | None = None) -> Tensor:
    """``(len(texts), dim)`` fp32 embeddings, in the order of ``texts``."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little is padded then

    def embed(indices: Sequence[int]) -> Tensor:
        chunk = [texts[index] for index in indices]
        return embed_texts(loaded, text_inputs(loaded, chunk, max_length=options.max_length, role=role))

    return _in_batches(order, embed, options.batch_size)


def embed_all_pictures(
    loaded: LoadedModel, samples: Sequence[Sample], indices: Sequence[int], options: Options
) -> Tensor:
    """``(len(indices), dim)`` fp32 embeddings of the pictures of ``samples[i]`` for each ``i``."""

    def embed(places: Sequence[int]) -> Tensor:
        chunk = [samples[indices[place]].image for place in places]
        return embed_images(loaded, image_inputs(loaded, chunk))

    return _in_batches(range(len(indices)), embed, options.batch_size)


@torch.inference_mode()
def _in_batches(order: Sequence[int], run: Callable[[Sequence[int]], Tensor], batch_size: int) -> Tensor:
    """Rows of ``run``, the row of ``order[i]`` at place ``order[i]``."""
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = torch.cat([run(chunk).cpu() for chunk in chunks])
    return rows[torch.tensor(order).argsort()]
