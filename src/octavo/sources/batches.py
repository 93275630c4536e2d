"""Calibration batches: samples of the data, ready for ``model(**batch)``."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources.inputs import check_inputs, image_inputs, processor_of, seq2seq_inputs, text_inputs
from octavo.sources.kinds import ModelKind
from octavo.sources.models import LoadedModel
from octavo.sources.samples import DataKind, Dataset, Sample

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 2048
"""Tokens of a language model's window when its own limit is higher: what GPTQ and AWQ calibrate with."""
CAPTION = "a photo of a {}."


class Batches:
    """Batches that can be gone through many times, in the same order; each is made when it is asked for."""

    def __init__(self, chunks: Sequence[Any], make: Callable[[Any], Any], *, num_samples: int) -> None:
        self._chunks = chunks
        self._make = make
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Any]:
        return (self._make(chunk) for chunk in self._chunks)


def batches(
    data: Dataset,
    loaded: LoadedModel,
    *,
    batch_size: int = 8,
    num_samples: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Batches:
    """Calibration batches of ``data`` for ``loaded``.

    A text file is cut into windows for a causal language model, and into paragraphs for others. Of a query and its
    document both are used. Pictures by class become pairs for a dual encoder, their class in a sentence.

    Args:
        data: what ``open_data`` gave.
        loaded: the model that will be fed.
        batch_size: samples in a batch.
        num_samples: so many, drawn by ``seed``; None means all. Fewer are a warning.
        max_length: tokens of a text; None means the model's limit, at most 2,048 for language models.
        seed: which samples are drawn, and in which order the batches come.

    Raises:
        UserError: the model does not take what the data has, or a number is not positive.
    """
    for option, value in (("batch size", batch_size), ("number of samples", num_samples), ("max length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"the {option} is {value}, and at least 1 is needed")
    check_fit(data, loaded)
    if data.kind is DataKind.BATCHES:
        chosen = list(data.samples[:num_samples])
        return Batches(chosen, _same, num_samples=len(chosen))
    rng = random.Random(seed)
    if data.kind is DataKind.ARRAYS:
        rows = [data.samples[i] for i in sorted(_draw(len(data.samples), num_samples, data, rng))]
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return Batches(groups, _joined, num_samples=len(rows))
    if loaded.kind is ModelKind.CAUSAL_LM and data.whole_text is not None:
        return _windows(data, loaded, batch_size, num_samples, max_length, rng)
    samples, make = inputs_of(data, loaded, max_length)
    chosen = _draw(len(samples), num_samples, data, rng)
    chunks = _by_length([samples[i] for i in chosen], batch_size, rng)
    return Batches(chunks, make, num_samples=len(chosen))


def check_fit(data: Dataset, loaded: LoadedModel) -> None:
    """Raise ``UserError`` unless the samples of ``data`` can be made into inputs of ``loaded``."""
    has = data.kind
    if has in (DataKind.BATCHES, DataKind.ARRAYS) or (loaded.kind is ModelKind.MODULE and loaded.collate is not None):
        return
    name = f"data '{data.name}'"
    if loaded.kind is ModelKind.DUAL_ENCODER:
        pairs = has is DataKind.CAPTIONED_IMAGES or (has is DataKind.LABELLED_IMAGES and data.class_names is not None)
        if not pairs:
            raise UserError(
                f"{name} has {has.value}, and model '{loaded.source}' (dual encoder) takes pictures with texts: "
                'JSON lines of {"image": ..., "text": ...}, or pictures in a folder for each class'
            )
        check_inputs(loaded, texts=True, pictures=True, needed_by=name)
    elif loaded.kind is ModelKind.MODULE:
        processor_of(loaded)
    else:
        uses_images = has.has_images and not (has.has_texts and loaded.kind.takes_texts)
        check_inputs(loaded, texts=not uses_images, pictures=uses_images, needed_by=name)


def token_windows(tokens: Tensor, length: int) -> list[Tensor]:
    """``(num_tokens,)`` cut into windows of ``length``; a shorter rest is left out unless it is all there is."""
    if len(tokens) < length:
        return [tokens]
    return list(torch.split(tokens[: len(tokens) // length * length], length))


def window_length(loaded: LoadedModel, max_length: int | None) -> int:
    """Tokens of a window: what is asked for, within what the model can see.

    Raises:
        UserError: more is asked for than the model has positions.
    """
    limit = processor_of(loaded).rules.max_length
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(f"max length {max_length} is more than the {limit} positions of model '{loaded.source}'")
    return max_length or min(limit or DEFAULT_WINDOW, DEFAULT_WINDOW)


def _windows(
    data: Dataset,
    loaded: LoadedModel,
    batch_size: int,
    num_samples: int | None,
    max_length: int | None,
    rng: random.Random,
) -> Batches:
    tokens = processor_of(loaded).token_ids(data.text_stream())
    windows = token_windows(tokens, window_length(loaded, max_length))
    chosen = [windows[i] for i in _draw(len(windows), num_samples, data, rng)]
    chunks = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return Batches(chunks, _stack_windows, num_samples=len(chosen))


def _stack_windows(windows: Sequence[Tensor]) -> dict[str, Tensor]:
    input_ids = torch.stack(tuple(windows))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def inputs_of(
    data: Dataset, loaded: LoadedModel, max_length: int | None
) -> tuple[Sequence[Sample], Callable[[Sequence[Sample]], Any]]:
    """The samples of ``data`` that ``loaded`` is fed, and what makes a batch of some of them."""
    kind = loaded.kind
    if loaded.collate is not None:
        return data.samples, loaded.collate
    if kind is ModelKind.SEQ2SEQ_LM:
        return data.samples, lambda chunk: seq2seq_inputs(
            loaded, [s.texts[0] for s in chunk], [s.texts[-1] for s in chunk], max_length=max_length
        )
    if kind is ModelKind.DUAL_ENCODER or (kind is ModelKind.MODULE and data.kind is DataKind.CAPTIONED_IMAGES):
        return _captioned(data), lambda chunk: {
            **text_inputs(loaded, [s.text for s in chunk], max_length=max_length),
            **image_inputs(loaded, [s.image for s in chunk]),
        }
    if data.kind.has_texts and (kind.takes_texts or kind is ModelKind.MODULE):
        length = window_length(loaded, max_length) if kind is ModelKind.CAUSAL_LM else max_length
        return _single_texts(data), lambda chunk: text_inputs(loaded, [s.text for s in chunk], max_length=length)
    return data.samples, lambda chunk: image_inputs(loaded, [s.image for s in chunk])


def _single_texts(data: Dataset) -> Sequence[Sample]:
    """Samples of one text each: a query and its document are two."""
    if data.kind is not DataKind.TEXT_PAIRS:
        return data.samples
    return [Sample(text=text) for sample in data.samples for text in sample.texts]


def _captioned(data: Dataset) -> Sequence[Sample]:
    """Samples with picture and text: a class becomes a sentence."""
    if data.kind is not DataKind.LABELLED_IMAGES or data.class_names is None:
        return data.samples
    templates = data.templates or (CAPTION,)
    names = [readable(name) for name in data.class_names]
    return [
        Sample(image=sample.image, text=templates[i % len(templates)].format(names[sample.label]))
        for i, sample in enumerate(data.samples)
    ]


def readable(class_name: str) -> str:
    """A folder's name as it would be said.

    >>> readable("tabby_cat")
    'tabby cat'
    """
    return class_name.replace("_", " ").strip()


def _draw(count: int, num_samples: int | None, data: Dataset, rng: random.Random) -> list[int]:
    if num_samples is None or num_samples >= count:
        if num_samples is not None and num_samples > count:
            logger.warning("data '%s' has %d samples, fewer than the %d asked for", data.name, count, num_samples)
        return list(range(count))
    return list(range(num_samples)) if data.is_in_random_order else rng.sample(range(count), num_samples)


def _by_length(samples: list[Sample], batch_size: int, rng: random.Random) -> list[list[Sample]]:
    """Chunks of texts about as long as each other, so that little is padded; the chunks in random order."""
    rng.shuffle(samples)
    samples.sort(key=lambda sample: sum(map(len, sample.texts)))
    chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    rng.shuffle(chunks)
    return chunks


def _joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _same(batch: Any) -> Any:
    return batch
