"""Encoder and decoder with keys and values: those of the source come from the encoder's file, once.

The decoder's file needs nothing of the source but them: ``present.N.encoder.key`` of the encoder's file goes in as
``past_key_values.N.encoder.key``. Its own tokens are kept as in ``cached``, as ``past_key_values.N.decoder.key``. So no
weight is in two files.

Shapes: B samples, S source positions, T new tokens, P tokens before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.onnx.cached import LEAST_TOKENS, LOGITS, SAME, cache_argument, first_line, new_cache, present

HIDDEN = "encoder_hidden_states"
_TOKENS = "decoder_input_ids"
_MASK = "attention_mask"
_OWN, _SOURCE = "past_key_values.{}.decoder.{}", "past_key_values.{}.encoder.{}"

Inputs = dict[str, Tensor]


@torch.no_grad()
def why_without(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Why the two graphs cannot keep keys and values; empty when they can.

    Args:
        model: Of transformers, with a head.
        inputs: A sample: of the source, and ``decoder_input_ids``.
    """
    others = [name for name in inputs if name.startswith("decoder_") and name != _TOKENS]
    if others:
        return f"it takes {', '.join(others)} beside tokens"
    if cache_argument(model) is None:
        return f"the forward of {type(model).__name__} takes no cache"
    last = inputs[_TOKENS].shape[1] - 1
    try:
        expected, found = (decode(model, **split(model, inputs, at))[LOGITS][:, -1].float() for at in (0, last))
        whole: Any = model(**inputs, use_cache=True)
    except Exception as error:  # models raise what they like when handed a cache of another kind
        return f"its past is no plain cache of keys and values ({first_line(error)})"
    plain = whole["logits"][:, -1].float()
    if min(float(F.cosine_similarity(one, plain, dim=-1).min()) for one in (expected, found)) < SAME:
        return "its last token's logits are others when what was before comes from a cache of keys and values"
    return ""


def source_of(inputs: Mapping[str, Tensor]) -> Inputs:
    """What the encoder takes."""
    return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


@torch.no_grad()
def encode(model: Any, **source: Tensor) -> Inputs:
    """Hidden states of the source, and every decoder layer's keys and values of them."""
    hidden = model.get_encoder()(**source)["last_hidden_state"]
    cache = _new(None, None)
    start = torch.zeros((hidden.shape[0], 1), dtype=torch.long, device=hidden.device)
    _forward(model, start, hidden, source.get(_MASK), cache)
    return {HIDDEN: hidden, **dict(present(cache.cross_attention_cache, _present(_SOURCE)))}


@torch.no_grad()
def decode(model: Any, decoder_input_ids: Tensor, attention_mask: Tensor | None = None, **past: Tensor) -> Inputs:
    """Logits of the new tokens, and the keys and values of all of the decoder's.

    Args:
        model: Of transformers.
        decoder_input_ids: ``(B, T)``.
        attention_mask: ``(B, S)``, of the source.
        past: Keys and values of every layer, ``(B, heads, P, channels)`` and ``(B, heads, S, channels)``.
    """
    own = [value for name, value in past.items() if ".decoder." in name]
    source = [value for name, value in past.items() if ".encoder." in name]
    cache = _new(own, source)
    batch, _, length, _ = source[0].shape
    hidden = source[0].new_zeros((batch, length, model.config.hidden_size))  # only its shape is looked at
    logits = _forward(model, decoder_input_ids, hidden, attention_mask, cache)
    return {LOGITS: logits, **dict(present(cache.self_attention_cache, _present(_OWN)))}


def split(model: nn.Module, inputs: Mapping[str, Tensor], at: int) -> Inputs:
    """What the decoder's file takes for the tokens from ``at`` on."""
    encoded = encode(model, **source_of(inputs))
    source = {name.replace("present", "past_key_values"): value for name, value in encoded.items() if name != HIDDEN}
    mask = {_MASK: inputs[_MASK]} if _MASK in inputs else {}
    nothing = {name.replace("encoder", "decoder"): value[:, :, :0] for name, value in source.items()}
    tokens = inputs[_TOKENS]
    if not at:
        return {_TOKENS: tokens, **mask, **nothing, **source}
    kept = decode(model, tokens[:, :at], **mask, **nothing, **source)
    own = {name: kept[name.replace("past_key_values", "present")] for name in nothing}
    return {_TOKENS: tokens[:, at:], **mask, **own, **source}


def traced(model: nn.Module, inputs: Mapping[str, Tensor]) -> Inputs:
    """A sample in which no size is 0 or 1, which would be taken for one that never changes."""
    times = -(-LEAST_TOKENS // inputs[_TOKENS].shape[1])
    tokens = torch.cat([inputs[_TOKENS]] * times, 1)
    return split(model, {**inputs, _TOKENS: tokens}, tokens.shape[1] // 2)


def axes(name: str, sizes: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """What the axes of one of the decoder's inputs count, by its name.

    Args:
        name: The input.
        sizes: The axes of the encoder's inputs; a source of one fixed length has keys of one fixed length.
    """
    source = {2: "sequence"} if any("sequence" in named.values() for named in sizes.values()) else {}
    if name == _TOKENS:
        return {0: "batch", 1: "decoder_sequence"}
    if name == _MASK:
        return dict(sizes.get(_MASK, {0: "batch"}))
    return {0: "batch"} | (source if ".encoder." in name else {2: "past_sequence"})


def _present(template: str) -> str:
    return template.replace("past_key_values", "present")


def _new(own: list[Tensor] | None, source: list[Tensor] | None) -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(new_cache(own), new_cache(source))


def _forward(model: Any, tokens: Tensor, hidden: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    rest = {} if mask is None else {_MASK: mask}
    known = {str(cache_argument(model)): cache, "use_cache": True}
    logits: Tensor = model(decoder_input_ids=tokens, encoder_outputs=(hidden,), **rest, **known)["logits"]
    return logits
