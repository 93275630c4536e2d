"""Which parts of a model become files, what goes into each and what comes out.

Shapes: B samples, T tokens, S decoder tokens.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.numerics.arrays import array_of
from octavo.onnx import cached, crossed
from octavo.sources import LoadedModel, ModelKind
from octavo.sources.graphs import GraphModule

_log = logging.getLogger(__name__)

INNER = "model"
_BATCH, _SEQUENCE, _TARGET = "batch", "sequence", "decoder_sequence"
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_attention_mask")

Outputs = dict[str, Tensor]


class Part(nn.Module):
    """A model seen through one of its uses: tensors in, in a stated order, tensors out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], use: Callable[..., Outputs]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.use = use

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the use, in its order."""
        return tuple(self.use(self.model, **dict(zip(self.names, inputs, strict=True))).values())


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a model that becomes a file of its own.

    Args:
        name: The file's name without its ending.
        module: Takes the tensors of ``inputs`` in their order and returns those of ``outputs``; the model is its
            ``model``.
        inputs: A sample of at least two.
        outputs: Names of what comes out.
        axes: Input name -> axis -> what it counts; axes with one name have one size.
    """

    name: str
    module: Part
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]

    @property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs, for readers of the file."""
        return {name: array_of(value) for name, value in self.inputs.items()}


def stages(loaded: LoadedModel, sample: Any, *, use_cache: bool = False) -> list[Stage]:
    """The parts of ``loaded`` that become files: the two towers of a dual encoder, encoder and decoder, or all of it.

    Args:
        loaded: A model, quantized or not.
        sample: One batch, as ``feed`` takes it.
        use_cache: A decoder takes the keys and values of earlier tokens, where ``can_cache`` says it can.

    Raises:
        UserError: the sample is not a tensor, a tuple or a dict of tensors, or nothing comes out.
    """
    inputs = _named(loaded.model, sample)
    match loaded.kind:
        case ModelKind.DUAL_ENCODER:
            texts = {k: v for k, v in inputs.items() if k in _TOKENS}
            pictures = {k: v for k, v in inputs.items() if k not in _TOKENS}
            return [
                _stage("text_model", loaded.model, texts, _text_features),
                _stage("vision_model", loaded.model, pictures, _image_features),
            ]
        case _ if _is_encoder_decoder(loaded, inputs):
            return _encoder_and_decoder(loaded.model, inputs, use_cache=use_cache)
        case ModelKind.CAUSAL_LM if use_cache:
            return [_cached(loaded.model, cached.traced(loaded.model, _batch_of_two(inputs)))]
        case ModelKind.CAUSAL_LM:
            return [_stage("model", loaded.model, inputs, _without_cache)]
        case _:
            return [_stage("model", loaded.model, inputs, _everything)]


def rounds(loaded: LoadedModel, batch: Any, *, use_cache: bool) -> list[list[Stage]]:
    """The parts as files of theirs are run on ``batch``: with a cache all tokens first, then the last one by itself."""
    model = loaded.model.eval()
    if not use_cache:
        return [stages(loaded, batch)]
    inputs = _named(model, batch)
    if _is_encoder_decoder(loaded, inputs):
        encoder = _stage("encoder_model", model, crossed.source_of(inputs), crossed.encode)
        first, *later = (_decoder(model, crossed.split(model, inputs, at), encoder.axes) for at in _rounds(inputs))
        return [[encoder, first], *([one] for one in later)]
    return [[_cached(model, cached.split(model, inputs, at))] for at in _rounds(inputs)]


def _rounds(inputs: Mapping[str, Tensor]) -> Iterable[int]:
    """Where the tokens of each run begin."""
    tokens = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
    return dict.fromkeys((0, tokens.shape[1] - 1))


def can_cache(loaded: LoadedModel, sample: Any) -> bool:
    """Whether a decoder among the parts can take the keys and values of earlier tokens; if not, the log says why."""
    if isinstance(loaded.model, GraphModule):
        return False
    inputs = _named(loaded.model.eval(), sample)
    if _is_encoder_decoder(loaded, inputs):
        why, name = crossed.why_without(loaded.model, inputs), "decoder_model.onnx"
    elif loaded.kind is ModelKind.CAUSAL_LM:
        why, name = cached.why_without(loaded.model, inputs), "model.onnx"
    else:
        return False
    if why:
        _log.warning("%s is written without a cache of keys and values: %s", name, why)
    return not why


def _is_encoder_decoder(loaded: LoadedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Texts, or sounds, to the logits of a decoder's tokens."""
    if loaded.config is None or not loaded.config.is_encoder_decoder or "decoder_input_ids" not in inputs:
        return False
    model: Any = loaded.model
    return model.get_output_embeddings() is not None


@torch.no_grad()
def _cached(model: nn.Module, inputs: Mapping[str, Tensor]) -> Stage:
    outputs = cached.decode(model, **inputs)
    axes = {name: cached.axes(name) for name in inputs}
    return Stage("model", Part(model, tuple(inputs), cached.decode), inputs, tuple(outputs), axes)


@torch.no_grad()
def _decoder(model: nn.Module, inputs: Mapping[str, Tensor], sizes: Mapping[str, Mapping[int, str]]) -> Stage:
    outputs = crossed.decode(model, **inputs)
    axes = {name: crossed.axes(name, sizes) for name in inputs}
    return Stage("decoder_model", Part(model, tuple(inputs), crossed.decode), inputs, tuple(outputs), axes)


def _encoder_and_decoder(model: nn.Module, inputs: dict[str, Tensor], *, use_cache: bool) -> list[Stage]:
    source = crossed.source_of(inputs)
    if use_cache:
        encoder = _stage("encoder_model", model, source, crossed.encode)
        return [encoder, _decoder(model, crossed.traced(model, _batch_of_two(inputs)), encoder.axes)]
    encoder = _stage("encoder_model", model, source, _encode)
    hidden = encoder.module(*encoder.inputs.values())[0]
    rest = {k: v for k, v in encoder.inputs.items() if k == "attention_mask"}
    wanted = {"decoder_input_ids": inputs["decoder_input_ids"], "encoder_hidden_states": hidden, **rest}
    return [encoder, _stage("decoder_model", model, wanted, _decode)]


@torch.no_grad()
def _stage(name: str, model: nn.Module, inputs: Mapping[str, Tensor], use: Callable[..., Outputs]) -> Stage:
    doubled = _batch_of_two(inputs)
    found = use(model.eval(), **doubled)
    if not found:
        raise UserError(f"the forward pass of a {type(model).__name__} returns no tensor, so there is nothing to write")
    axes = {key: _axes(key, value) for key, value in doubled.items()}
    return Stage(name, Part(model, tuple(doubled), use), doubled, tuple(found), axes)


def _axes(name: str, value: Tensor) -> dict[int, str]:
    if value.ndim == 0:
        return {}
    second = {**dict.fromkeys(_TOKENS, _SEQUENCE), **dict.fromkeys(_DECODER_TOKENS, _TARGET)}.get(name)
    if name == "encoder_hidden_states":
        second = _SEQUENCE
    return {0: _BATCH} | ({1: second} if second is not None and value.ndim > 1 else {})


def _batch_of_two(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At least two samples: an axis of one would be taken for one that never changes."""
    return {k: v if v.ndim == 0 or v.shape[0] != 1 else torch.cat([v, v]) for k, v in inputs.items()}


def _named(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The tensors of a batch, under the names of the forward's arguments."""
    match sample:
        case Tensor():
            given: Any = (sample,)
        case Mapping() | tuple() | list():
            given = sample
        case _:
            raise UserError(
                "the ONNX layout traces one forward pass and needs a batch for it: pass sample=..., a tensor, a tuple "
                f"or a dict of tensors, not a {type(sample).__name__}"
            )
    if not isinstance(given, Mapping):
        names = model.input_names if isinstance(model, GraphModule) else inspect.signature(model.forward).parameters
        given = dict(zip(names, given, strict=False))
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "labels"}
    if not tensors:
        raise UserError("the batch for the traced forward holds no tensor")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {key: value.to(device) for key, value in tensors.items()}


def _text_features(model: Any, **inputs: Tensor) -> Outputs:
    return {"text_embeds": _features(model.get_text_features(**inputs))}


def _image_features(model: Any, **inputs: Tensor) -> Outputs:
    return {"image_embeds": _features(model.get_image_features(**inputs))}


def _features(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output["pooler_output"]
    return features


def _without_cache(model: Any, **inputs: Tensor) -> Outputs:
    return {"logits": model(**inputs, use_cache=False)["logits"]}


def _encode(model: Any, **inputs: Tensor) -> Outputs:
    return {"encoder_hidden_states": model.get_encoder()(**inputs)["last_hidden_state"]}


def _decode(model: Any, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, **rest: Tensor) -> Outputs:
    output = model(
        decoder_input_ids=decoder_input_ids, encoder_outputs=(encoder_hidden_states,), use_cache=False, **rest
    )
    return {"logits": output["logits"]}


def _everything(model: Any, **inputs: Tensor) -> Outputs:
    """Every tensor that the model returns, under its own names where it has any."""
    output = model(**inputs)
    match output:
        case Tensor():
            return {"output": output}
        case Mapping():  # a value that goes by two names leaves under the first
            first = {id(value): key for key, value in reversed(list(output.items())) if isinstance(value, Tensor)}
            return {key: value for key, value in output.items() if first.get(id(value)) == key}
        case tuple() | list():
            return {f"output_{i}": value for i, value in enumerate(output) if isinstance(value, Tensor)}
    return {}
