"""Samples to the inputs of one particular model."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources.graphs import GraphModule
from octavo.sources.kinds import ModelKind
from octavo.sources.models import LoadedModel
from octavo.sources.processors import Processor
from octavo.sources.samples import read_image


def text_inputs(
    loaded: LoadedModel, texts: Sequence[str], *, max_length: int | None = None, role: str | None = None
) -> dict[str, Tensor]:
    """What ``loaded`` takes for ``texts``, ``(B, T)`` each.

    Args:
        loaded: a model that reads texts.
        texts: B of them.
        max_length: cut after so many tokens; None means the model's own limit.
        role: ``"query"`` or ``"document"`` for a sentence encoder that writes a prompt before them.

    Raises:
        UserError: the model has no tokenizer.
    """
    prompt = loaded.head.prompt(role) if loaded.head is not None else ""
    encoded = processor_of(loaded).texts([prompt + text for text in texts], max_length)
    return _accepted(loaded, encoded)


def image_inputs(loaded: LoadedModel, images: Sequence[Any]) -> dict[str, Tensor]:
    """What ``loaded`` takes for the pictures of samples, in the model's floating-point type.

    Raises:
        UserError: the model has no image processor, or a picture cannot be read.
    """
    encoded = processor_of(loaded).images([read_image(image) for image in images])
    return _accepted(loaded, {key: _cast(value, loaded.dtype) for key, value in encoded.items()})


def seq2seq_inputs(
    loaded: LoadedModel, sources: Sequence[str], targets: Sequence[str], *, max_length: int | None = None
) -> dict[str, Tensor]:
    """Inputs of encoder and decoder; the decoder sees ``targets`` one place to the right, as in training."""
    encoder = text_inputs(loaded, sources, max_length=max_length)
    target_ids = processor_of(loaded).texts(targets, max_length)["input_ids"]
    start = loaded.config.decoder_start_token_id
    first = torch.full_like(target_ids[:, :1], loaded.config.pad_token_id if start is None else start)
    return {**encoder, "decoder_input_ids": torch.cat([first, target_ids[:, :-1]], dim=1)}


def processor_of(loaded: LoadedModel) -> Processor:
    """The model's processor.

    Raises:
        UserError: the model was handed in without one.
    """
    if loaded.processor is None:
        raise UserError(
            f"model '{loaded.source}' came without a processor, so texts and pictures cannot be turned into its "
            "inputs; pass ready batches, or hand in the processor with the model"
        )
    return loaded.processor


def check_inputs(loaded: LoadedModel, *, texts: bool, pictures: bool, needed_by: str) -> None:
    """Raise ``UserError`` unless ``loaded`` takes what is asked for and has the files to prepare it."""
    takes = _takes(loaded.kind)
    if (texts and not loaded.kind.takes_texts) or (pictures and not loaded.kind.takes_pictures):
        wanted = " and ".join(name for name, is_used in (("pictures", pictures), ("texts", texts)) if is_used)
        raise UserError(
            f"{needed_by} has {wanted}, and model '{loaded.source}' ({loaded.kind.value}) takes "
            f"{takes or 'ready batches'}"
        )
    processor = processor_of(loaded)
    if texts and not processor.has_texts:
        _ = processor.tokenizer  # says which files it looked for
    if pictures and not processor.has_pictures:
        _ = processor.image_processor


def _takes(kind: ModelKind) -> str:
    names = (("pictures", kind.takes_pictures), ("texts", kind.takes_texts))
    return " and ".join(name for name, is_taken in names if is_taken)


def _accepted(loaded: LoadedModel, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tokenizer may give more than the model takes (``token_type_ids``)."""
    if isinstance(loaded.model, GraphModule):
        names: Collection[str] = loaded.model.input_names
    else:
        names = inspect.signature(loaded.model.forward).parameters
    return {key: value for key, value in encoded.items() if key in names}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
