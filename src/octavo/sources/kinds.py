"""What a model takes and gives, read from the mappings that transformers itself loads models by."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from torch import nn

from octavo.sources.extras import require


class ModelKind(Enum):
    """What goes into a model and what comes out."""

    DUAL_ENCODER = "dual encoder"
    """Pictures and texts into one space: CLIP, SigLIP."""
    TEXT_ENCODER = "text encoder"
    """Texts to vectors: BERT and its like, sentence encoders."""
    TEXT_CLASSIFIER = "text classifier"
    """Texts to the logits of classes."""
    IMAGE_CLASSIFIER = "image classifier"
    """Pictures to the logits of classes."""
    IMAGE_ENCODER = "image encoder"
    """Pictures to vectors: plain vision backbones."""
    CAUSAL_LM = "causal language model"
    """Tokens to the logits of the next one."""
    SEQ2SEQ_LM = "sequence-to-sequence language model"
    """An encoder's tokens and a decoder's tokens to the logits of the decoder's next one."""
    MODULE = "module"
    """Any other ``nn.Module``."""

    @property
    def takes_texts(self) -> bool:
        """The model reads texts; a plain module's inputs are its owner's business."""
        return self not in (ModelKind.IMAGE_CLASSIFIER, ModelKind.IMAGE_ENCODER, ModelKind.MODULE)

    @property
    def takes_pictures(self) -> bool:
        """The model sees pictures; a plain module's inputs are its owner's business."""
        return self in (ModelKind.DUAL_ENCODER, ModelKind.IMAGE_CLASSIFIER, ModelKind.IMAGE_ENCODER)


def kind_of_class(model_class: type[nn.Module], *, is_encoder_decoder: bool) -> ModelKind:
    """Kind of a transformers model class.

    Every ancestor's name is looked up, so a subclass of ``BertModel`` is what ``BertModel`` is.
    """
    names = [ancestor.__name__ for ancestor in model_class.__mro__]
    for name in names:
        kind = _kind_of_name(name, model_class, is_encoder_decoder=is_encoder_decoder)
        if kind is not ModelKind.MODULE:
            return kind
    return ModelKind.MODULE


def embeds_both(model: nn.Module | type[nn.Module]) -> bool:
    """The model has transformers' two feature methods of a dual encoder."""
    methods = ("get_text_features", "get_image_features")
    return all(callable(getattr(model, method, None)) for method in methods)


def _kind_of_name(name: str, model_class: type[nn.Module], *, is_encoder_decoder: bool) -> ModelKind:
    """Kind of one class name: the first mapping that knows it decides."""
    main_input: str = getattr(model_class, "main_input_name", "input_ids")
    if _is_mapped(name, "ZERO_SHOT_IMAGE_CLASSIFICATION") and embeds_both(model_class):
        return ModelKind.DUAL_ENCODER
    if is_encoder_decoder:
        is_text = main_input == "input_ids" and _is_mapped(name, "SEQ_TO_SEQ_CAUSAL_LM")
        return ModelKind.SEQ2SEQ_LM if is_text else ModelKind.MODULE
    if _is_mapped(name, "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        return ModelKind.CAUSAL_LM
    if _is_mapped(name, "IMAGE_CLASSIFICATION"):
        return ModelKind.IMAGE_CLASSIFIER
    if _is_mapped(name, "SEQUENCE_CLASSIFICATION"):
        return ModelKind.TEXT_CLASSIFIER
    if _is_encoder(name):
        by_input = {"pixel_values": ModelKind.IMAGE_ENCODER, "input_ids": ModelKind.TEXT_ENCODER}
        return by_input.get(main_input, ModelKind.MODULE)
    return ModelKind.MODULE


def _is_encoder(name: str) -> bool:
    """A bare backbone, possibly with a projection or with the masked-word head it was trained with."""
    base = name.replace("ModelWithProjection", "Model")
    return _is_mapped(base, "", "IMAGE", "TEXT_ENCODING", "BACKBONE", "MASKED_LM", "PRETRAINING")


def _is_mapped(class_name: str, *tasks: str) -> bool:
    """Does transformers load ``class_name`` for one of ``tasks`` (``""``: the bare model)?"""
    require("transformers", needed_for="finding out what kind of model this is")
    from transformers.models.auto import modeling_auto

    for task in tasks:
        mapping_name = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
        if class_name in _flat(vars(modeling_auto).get(mapping_name, {}).values()):
            return True
    return False


def _flat(names: Iterable[str | tuple[str, ...]]) -> set[str]:
    """A mapping names one class or several for a configuration."""
    flat: set[str] = set()
    for name in names:
        flat.update((name,) if isinstance(name, str) else name)
    return flat
