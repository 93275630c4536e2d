"""Inputs made up from what a model says of itself: enough for one traced forward, before any data is there."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources.graphs import GRAPH_FILE, GraphModule
from octavo.sources.inputs import image_inputs, text_inputs
from octavo.sources.kinds import ModelKind
from octavo.sources.models import LoadedModel

logger = logging.getLogger(__name__)

_TEXT = "one leaf folded three times"
_NUM_TOKENS = 8


def example_inputs(loaded: LoadedModel) -> dict[str, Tensor] | None:
    """A batch of one made-up sample, or ``None`` where nothing tells what the model takes.

    The model's own tokenizer and image processor are used where they are, else shapes from its configuration.
    """
    if isinstance(loaded.model, GraphModule):
        return None if loaded.model.path.name == GRAPH_FILE else loaded.model.example()
    try:
        made = _from_processor(loaded)
    except UserError as error:
        logger.debug("no example from the processor: %s", error)
        made = None
    return made or _from_config(loaded)


def _from_processor(loaded: LoadedModel) -> dict[str, Tensor] | None:
    if loaded.processor is None or loaded.kind is ModelKind.MODULE:
        return None
    batch: dict[str, Tensor] = {}
    if loaded.kind.takes_texts:
        batch |= text_inputs(loaded, [_TEXT])
    if loaded.kind.takes_pictures:
        batch |= image_inputs(loaded, [torch.full((32, 32, 3), 128, dtype=torch.uint8).numpy()])
    if loaded.kind is ModelKind.SEQ2SEQ_LM and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"][:, :_NUM_TOKENS]
    return batch or None


def _from_config(loaded: LoadedModel) -> dict[str, Tensor] | None:
    config: Any = loaded.config
    if config is None:
        return None
    taken = inspect.signature(loaded.model.forward).parameters
    tokens = torch.ones((1, _NUM_TOKENS), dtype=torch.long)
    batch: dict[str, Tensor] = {}
    if "input_ids" in taken:
        batch["input_ids"] = tokens
    if "decoder_input_ids" in taken and config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens
    if "pixel_values" in taken:
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        if size is None:
            return None
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        batch["pixel_values"] = torch.zeros((1, channels, height, width), dtype=loaded.dtype)
    return batch or None
