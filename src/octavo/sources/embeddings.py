"""What a model says about its inputs: embeddings and logits, the same way before and after quantization.

Shapes: B samples, T tokens, D channels, H and W of a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.sources.kinds import ModelKind
from octavo.sources.models import LoadedModel
from octavo.sources.sentence import SentenceHead

Inputs = Mapping[str, Tensor]


def embed_texts(loaded: LoadedModel, inputs: Inputs) -> Tensor:
    """``(B, dim)`` fp32 embeddings of texts.

    A dual encoder's text features; a sentence encoder's pooled vectors as its files declare them; of a plain
    encoder the mean over the tokens that the attention mask keeps.

    Raises:
        UserError: the model has no embeddings of texts.
    """
    inputs = to_device(inputs, loaded.device)
    match loaded.kind:
        case ModelKind.DUAL_ENCODER:
            return _features(loaded.model.get_text_features(**inputs))  # type: ignore[operator]
        case ModelKind.TEXT_ENCODER | ModelKind.TEXT_CLASSIFIER:
            return _pooled_text(loaded, inputs)
    raise UserError(f"model '{loaded.source}' is a {loaded.kind.value}: it has no embeddings of texts")


def embed_images(loaded: LoadedModel, inputs: Inputs) -> Tensor:
    """``(B, dim)`` fp32 embeddings of pictures.

    A dual encoder's image features; of a plain backbone the pooled output, or the mean of its last tokens.

    Raises:
        UserError: the model has no embeddings of pictures.
    """
    inputs = to_device(inputs, loaded.device)
    match loaded.kind:
        case ModelKind.DUAL_ENCODER:
            return _features(loaded.model.get_image_features(**inputs))  # type: ignore[operator]
        case ModelKind.IMAGE_ENCODER:
            return _pooled_image(loaded.model(**inputs))
    raise UserError(f"model '{loaded.source}' is a {loaded.kind.value}: it has no embeddings of pictures")


def logits(loaded: LoadedModel, inputs: Any) -> Tensor:
    """``(B, classes)`` or ``(B, T, vocabulary)`` logits in the model's own type; a plain module's first output.

    Raises:
        UserError: the model gives no logits.
    """
    output = call(loaded.model, to_device(inputs, loaded.device))
    match output:
        case Tensor():
            return output
        case {"logits": Tensor() as values}:
            return values
        case [Tensor() as first, *_] if loaded.kind is ModelKind.MODULE:
            return first
        case Mapping() if loaded.kind is ModelKind.MODULE:
            return _first_tensor(loaded, output)
    raise UserError(f"model '{loaded.source}' ({type(loaded.model).__name__}) gives no logits")


def call(model: Any, inputs: Any) -> Any:
    """``model(**inputs)``, ``model(*inputs)`` or ``model(inputs)``, whichever the batch is made for.

    Raises:
        UserError: a batch of any other type.
    """
    match inputs:
        case Tensor():
            return model(inputs)
        case Mapping():
            return model(**inputs)
        case tuple() | list():
            return model(*inputs)
    raise UserError(f"a batch is a tensor, a tuple of arguments or a dict of them, not a {type(inputs).__name__}")


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor in it on ``device``."""
    match batch:
        case Tensor():
            return batch.to(device)
        case Mapping():
            return {key: to_device(value, device) for key, value in batch.items()}
        case tuple() | list():
            return tuple(to_device(value, device) for value in batch)
    return batch


def _features(output: Any) -> Tensor:
    """Before version 5 transformers returned the tensor itself."""
    features: Tensor = output if isinstance(output, Tensor) else output["pooler_output"]
    return features.float()


def _pooled_text(loaded: LoadedModel, inputs: Inputs) -> Tensor:
    # a head for words or classes is left aside: base_model is the encoder below it, quantized with the rest
    model: Any = loaded.model
    output = model.base_model(**inputs)
    if "text_embeds" in output:
        embedded: Tensor = output["text_embeds"]
        return embedded.float()
    tokens_BTD: Tensor = output["last_hidden_state"]
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None:
        mask_BT = torch.ones(tokens_BTD.shape[:2], dtype=torch.long, device=tokens_BTD.device)
    return (loaded.head or SentenceHead())(tokens_BTD, mask_BT)


def _pooled_image(output: Any) -> Tensor:
    for key in ("image_embeds", "pooler_output"):
        pooled = output.get(key)
        if isinstance(pooled, Tensor):
            return pooled.flatten(1).float()
    hidden = output["feature_maps"][-1] if "feature_maps" in output else output["last_hidden_state"]
    return _mean_of_places(hidden.float())


def _mean_of_places(hidden: Tensor) -> Tensor:
    """``(B, T, D)`` tokens or a ``(B, D, H, W)`` feature map to ``(B, D)``."""
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)


def _first_tensor(loaded: LoadedModel, output: Mapping[str, Any]) -> Tensor:
    for value in output.values():
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Sequence) and value and isinstance(value[0], Tensor):
            return value[0]
    raise UserError(f"model '{loaded.source}' ({type(loaded.model).__name__}) returns no tensor")
