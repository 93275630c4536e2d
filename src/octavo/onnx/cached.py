"""Decoders with the keys and values of earlier tokens as inputs of their graph, and all of them as outputs.

The names are those that optimum and onnxruntime-genai know: ``past_key_values.N.key`` goes in, ``present.N.key`` comes
out, and so for ``value``. One file does both: the prompt comes with a past of no tokens, later tokens one by one.

Shapes: B samples, T new tokens, P tokens before them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Tensor]
LOGITS = "logits"
_TOKENS = ("input_ids", "attention_mask", "position_ids")
_PARTS = ("key", "value")
_PAST, _PRESENT = "past_key_values.{}.{}", "present.{}.{}"
LEAST_TOKENS = 4
SAME = 0.99


@torch.no_grad()
def why_without(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Why the graph of a causal language model cannot have a cache; empty when it can.

    Args:
        model: Of transformers.
        inputs: A sample; what it needs beside tokens could not be given for one token alone.
    """
    others = [name for name in inputs if name not in _TOKENS]
    if others:
        return f"it takes {', '.join(others)} beside tokens"
    if cache_argument(model) is None:
        return f"the forward of {type(model).__name__} takes no cache"
    whole = prompt(model, inputs)
    if isinstance(whole, str):
        return whole
    expected = decode(model, **whole)[LOGITS][:, -1].float()
    found = decode(model, **split(model, inputs, whole["input_ids"].shape[1] - 1))[LOGITS][:, -1].float()
    if float(F.cosine_similarity(found, expected, dim=-1).min()) < SAME:
        return "its last token's logits are others when the tokens before come from a cache of keys and values"
    return ""


@torch.no_grad()
def prompt(model: nn.Module, inputs: Mapping[str, Tensor]) -> Inputs | str:
    """``inputs`` with a past of no tokens; or why the model does not keep its past as keys and values."""
    given = _complete(model, inputs)
    cache = new_cache()
    try:
        _forward(model, given, cache)
        tensors = dict(present(cache, _PAST))
    except Exception as error:  # models raise what they like when handed a cache of another kind
        return f"its past is no plain cache of keys and values ({first_line(error)})"
    total = given["attention_mask"].shape[1]
    if not tensors or any(value.ndim != 4 or value.shape[2] != total for value in tensors.values()):
        return "not every layer keeps the keys and values of all tokens"
    return {**given, **{name: value[:, :, :0] for name, value in tensors.items()}}


def split(model: nn.Module, inputs: Mapping[str, Tensor], at: int) -> Inputs:
    """The tokens from ``at`` on, with what the model keeps of those before."""
    whole = prompt(model, inputs)
    assert isinstance(whole, dict)
    tokens, mask = whole["input_ids"], whole["attention_mask"]
    first = {**whole, "input_ids": tokens[:, :at], "attention_mask": mask[:, :at]}
    rest = {**whole, "input_ids": tokens[:, at:]}
    if "position_ids" in whole:
        first["position_ids"], rest["position_ids"] = whole["position_ids"][:, :at], whole["position_ids"][:, at:]
    if at:
        kept = decode(model, **first)
        rest |= {name: kept[name.replace("past_key_values", "present")] for name in whole if name not in _TOKENS}
    return rest


def traced(model: nn.Module, inputs: Mapping[str, Tensor]) -> Inputs:
    """A sample in which no size is 0 or 1, which would be taken for one that never changes."""
    length = inputs["input_ids"].shape[1]
    times = -(-LEAST_TOKENS // length)
    longer = {name: torch.cat([value] * times, 1) for name, value in inputs.items() if name != "position_ids"}
    return split(model, longer if times > 1 else inputs, times * length // 2)


@torch.no_grad()
def decode(model: nn.Module, **inputs: Tensor) -> Inputs:
    """Logits of the new tokens, and the keys and values of all.

    Args:
        model: Of transformers.
        inputs: ``input_ids`` ``(B, T)``, ``attention_mask`` ``(B, P + T)``, ``position_ids`` ``(B, T)`` where the model
            takes them, and keys and values ``(B, heads, P, channels)`` of every layer.
    """
    past = [value for name, value in inputs.items() if name not in _TOKENS]
    cache = new_cache(past)
    logits = _forward(model, {name: value for name, value in inputs.items() if name in _TOKENS}, cache)
    return {LOGITS: logits, **dict(present(cache, _PRESENT))}


def axes(name: str) -> dict[int, str]:
    """What the axes of an input count, by its name."""
    match name:
        case "attention_mask":
            return {0: "batch", 1: "total_sequence"}
        case "input_ids" | "position_ids":
            return {0: "batch", 1: "sequence"}
        case _:
            return {0: "batch", 2: "past_sequence"}


def _complete(model: nn.Module, inputs: Mapping[str, Tensor]) -> Inputs:
    """Tokens with a mask, and with positions where the model takes them."""
    tokens = inputs["input_ids"]
    found = {"input_ids": tokens, "attention_mask": inputs.get("attention_mask", torch.ones_like(tokens))}
    if "position_ids" in inspect.signature(model.forward).parameters:
        counted = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        found["position_ids"] = inputs.get("position_ids", counted)
    return found


def cache_argument(model: nn.Module) -> str | None:
    """What a model's forward calls its cache; ``None`` where it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def new_cache(past: list[Tensor] | None = None) -> Any:
    """transformers' plain cache with keys and values, of one layer after the other, as its content."""
    from transformers import DynamicCache

    return DynamicCache(list(zip(past[::2], past[1::2], strict=True)) if past else None)


def _forward(model: Any, inputs: Mapping[str, Tensor], cache: Any) -> Tensor:
    logits: Tensor = model(**inputs, **{str(cache_argument(model)): cache}, use_cache=True)["logits"]
    return logits


def present(cache: Any, template: str) -> Iterator[tuple[str, Tensor]]:
    """What a plain cache holds, named by ``template`` with a place for the layer and one for the part."""
    for index, layer in enumerate(cache.layers):
        kept = zip(_PARTS, (layer.keys, layer.values), strict=True)
        yield from ((template.format(index, part), value) for part, value in kept)


def first_line(error: Exception) -> str:
    """What an error says, shortened; its class where it says nothing."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip()[:200]
