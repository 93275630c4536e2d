"""Quantizers around attention: at call expressions found by observation, and inside ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.layers import through
from octavo.nn.rewrite import (
    NoSourceError,
    Position,
    Redirect,
    Redirected,
    method_with_code,
    redirected,
    replace_inner,
)
from octavo.nn.trace import AttentionCall
from octavo.spec.facts import QUANTIZER_NAMES, Slot

ATTENTION_SLOTS = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.ATTENTION_OUTPUT)
_ARGUMENTS = ((Slot.QUERY, "query"), (Slot.KEY, "key"), (Slot.VALUE, "value"))


def child_name(slot: Slot, ordinal: int) -> str:
    """Name of a quantizer as a child of the attention's owner; the second call in one module has ``_1`` behind it."""
    return QUANTIZER_NAMES[slot] + (f"_{ordinal}" if ordinal else "")


def _redirect(ordinal: int, *, is_interface: bool) -> Redirect:
    """Attention with its three inputs and its output quantized by children of ``owner``."""
    offset = 1 if is_interface else 0
    inputs = [(child_name(slot, ordinal), offset + k, name) for k, (slot, name) in enumerate(_ARGUMENTS)]
    output_name = child_name(Slot.ATTENTION_OUTPUT, ordinal)

    def attend(owner: nn.Module, callee: Any, *args: Any, **kwargs: Any) -> Any:
        values = list(args)
        for child, k, name in inputs:
            quantizer = owner._modules.get(child)
            if quantizer is None:
                continue
            if k < len(values):
                values[k] = quantizer(values[k])
            else:
                kwargs[name] = quantizer(kwargs[name])
        output = callee(*values, **kwargs)
        quantizer = owner._modules.get(output_name)
        if quantizer is None:
            return output
        return (quantizer(output[0]), *output[1:]) if isinstance(output, tuple) else quantizer(output)

    return attend


def _enter(inner: Sequence[Redirected], otherwise: Redirect | None) -> Redirect:
    """A call of a function whose code is among ``inner``, redirected inside.

    Any other callee is the attention itself where ``otherwise`` says how that is redirected, and else left alone.
    """
    clones: dict[FunctionType, FunctionType] = {}

    def enter(owner: nn.Module, callee: Any, *args: Any, **kwargs: Any) -> Any:
        function, first, named = _plain(callee)
        code = getattr(function, "__code__", None)
        for within in inner:  # no dict of codes: torch.compile cannot look into one
            if code is within.code:
                if function not in clones:
                    clones[function] = within.made_from(function)
                return clones[function](owner, *first, *args, **{**named, **kwargs})
        return callee(*args, **kwargs) if otherwise is None else otherwise(owner, callee, *args, **kwargs)

    return enter


def _plain(callee: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function that ``callee`` calls, and the arguments that it puts first: of methods, partials, objects."""
    if isinstance(callee, partial):
        function, first, named = _plain(callee.func)
        return function, (*first, *callee.args), {**named, **callee.keywords}
    if isinstance(callee, MethodType):
        return callee.__func__, (callee.__self__,), {}
    call = type(callee).__call__
    return (callee, (), {}) if not isinstance(call, FunctionType) else (call, (callee,), {})


def _redirects(calls: Sequence[tuple[int, AttentionCall]], depth: int) -> dict[Position, Redirect]:
    """Redirects for the functions at ``depth`` of the calls' chains, which all share that function."""
    points: dict[Position, list[tuple[int, AttentionCall]]] = {}
    for ordinal, call in calls:
        points.setdefault(call.chain[depth].position, []).append((ordinal, call))
    return {position: _redirect_at(below, depth) for position, below in points.items()}


def _redirect_at(calls: Sequence[tuple[int, AttentionCall]], depth: int) -> Redirect:
    """One call expression, through which all of ``calls`` go: it is the attention, or leads to it."""
    here: Redirect | None = None
    deeper: dict[CodeType, list[tuple[int, AttentionCall]]] = {}
    for ordinal, call in calls:
        if len(call.chain) == depth + 1:
            here = here or _redirect(ordinal, is_interface=call.is_interface)
        else:
            deeper.setdefault(call.chain[depth + 1].code, []).append((ordinal, call))
    if here is not None and not deeper:
        return here
    inner = [redirected(code, _redirects(group, depth + 1), takes_owner=True) for code, group in deeper.items()]
    return _enter(inner, here)


@cache
def attention_class(cls: type[nn.Module], calls: tuple[tuple[int, AttentionCall], ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose attention calls pass the quantizers.

    Raises:
        NoSourceError: a function on the way to a call cannot be compiled again.
    """
    by_code: dict[CodeType, list[tuple[int, AttentionCall]]] = {}
    for ordinal, call in calls:
        by_code.setdefault(call.chain[0].code, []).append((ordinal, call))
    methods: dict[str, Any] = {}
    for code, group in by_code.items():
        found = method_with_code(cls, code)
        if found is None:
            raise NoSourceError(f"{code.co_name} is not a method of {cls.__name__}")
        name, inner = found
        new = redirected(code, _redirects(group, 0), takes_owner=False).made_from(inner)
        outer = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
        methods[name] = replace_inner(outer, inner, new)
    body = {**methods, "octavo_original": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


class QuantMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with its projections and its attention visible to quantizers.

    The packed projection's quantizers are children of ``in_proj`` (``q_proj``, ``k_proj``, ``v_proj`` where key and
    value have widths of their own); ``out_proj`` is a linear layer like any other. torch's fused fast path, which
    would bypass all of them, is not taken.
    """

    octavo_original = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        is_batched = query.dim() == 3
        query_BLE, key_BSE, value_BSE = (self._batch_first(t, is_batched) for t in (query, key, value))
        q, k, v = self._project(query_BLE, key_BSE, value_BSE)
        padding = key_padding_mask if key_padding_mask is None or is_batched else key_padding_mask[None]
        k, v, padding, attn_mask = self._extend(k, v, padding, attn_mask)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = _merged_mask(attn_mask, padding, q, k.shape[2], is_causal=is_causal)
        q, k, v = (through(self, slot, t) for (slot, _), t in zip(_ARGUMENTS, (q, k, v), strict=True))
        output, weights = self._attend(q, k, v, mask, need_weights=need_weights)
        output = through(self, Slot.ATTENTION_OUTPUT, output)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        if not is_batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            holder = self._modules.get("in_proj") or self
            weights = through(holder, Slot.WEIGHT, self.in_proj_weight).chunk(3)
            inputs = [through(holder, Slot.INPUT, x) for x in _distinct(query, key, value)]
            inputs = inputs * 3 if len(inputs) == 1 else inputs
        else:
            names = ("q_proj", "k_proj", "v_proj")
            holders = [self._modules.get(name) or self for name in names]
            raw = [getattr(self, f"{name}_weight") for name in names]
            weights = tuple(through(h, Slot.WEIGHT, w) for h, w in zip(holders, raw, strict=True))
            inputs = [through(h, Slot.INPUT, x) for h, x in zip(holders, (query, key, value), strict=True)]
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        return q, k, v

    def _extend(
        self, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The learned and the zero key that ``add_bias_kv`` and ``add_zero_attn`` append."""
        extra: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.expand(k.shape[0], 1, -1), self.bias_v.expand(v.shape[0], 1, -1)))
        if self.add_zero_attn:
            extra.append((torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])))
        for more_k, more_v in extra:
            k, v = torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1)
            padding = None if padding is None else F.pad(padding, (0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, padding, mask

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout)
        return weights @ v, weights


def _distinct(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return [query] if query is key and key is value else [query, key, value]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _merged_mask(
    mask: Tensor | None, padding: Tensor | None, q_BHLD: Tensor, num_keys: int, *, is_causal: bool
) -> Tensor | None:
    """One additive mask that broadcasts to ``(batch, heads, queries, keys)``.

    torch takes ``is_causal`` as a hint that ``attn_mask`` is causal: the mask itself is what counts.
    """
    if is_causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch says it
    total = None
    if mask is not None:
        total = _additive(mask, q_BHLD)
        if total.dim() == 3:
            total = total.unflatten(0, (-1, q_BHLD.shape[1]))
    if padding is not None:
        extra = _additive(padding, q_BHLD).view(-1, 1, 1, num_keys)
        total = extra if total is None else total + extra
    return total
