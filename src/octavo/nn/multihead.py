"""The counterpart of ``nn.MultiheadAttention``, which hands raw weights to a functional call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.layers import through
from octavo.spec.facts import QUANTIZER_NAMES, Slot

_ARGUMENTS = (Slot.QUERY, Slot.KEY, Slot.VALUE)
_SLOTS = (*_ARGUMENTS, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)

MULTIHEAD_INPUTS = {
    "in_proj_weight": "in",
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
    "out_proj_weight": "out",
}
"""Weight that ``F.multi_head_attention_forward`` takes -> what its input is called here."""


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
        projected = self._project(query_BLE, key_BSE, value_BSE)
        padding = key_padding_mask if key_padding_mask is None or is_batched else key_padding_mask[None]
        quantizers = {slot.value: self._modules.get(QUANTIZER_NAMES[slot]) for slot in _SLOTS}
        output, weights = _attention(
            quantizers,
            projected,
            self.num_heads,
            _Options(
                self.bias_k, self.bias_v, self.add_zero_attn, self.dropout if self.training else 0.0,
                padding, attn_mask, is_causal, need_weights,
            ),
        )  # fmt: skip
        output = self.out_proj(output)
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


@dataclass(frozen=True, slots=True)
class _Options:
    """What attention may have besides its three inputs, as torch names it."""

    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout: float
    padding: Tensor | None
    mask: Tensor | None
    is_causal: bool
    need_weights: bool


Quantizers = Mapping[str, Callable[[Tensor], Tensor] | None]
"""Name of a slot, or of a projection's input -> what rounds there."""


def _rounded(quantizers: Quantizers, name: str, x: Tensor) -> Tensor:
    quantizer = quantizers.get(name)
    return x if quantizer is None else quantizer(x)


def _attention(
    quantizers: Quantizers, projected: tuple[Tensor, ...], num_heads: int, options: _Options
) -> tuple[Tensor, Tensor | None]:
    """Attention of projected ``(batch, tokens, channels)``: the output in the same shape, and the probabilities."""
    q, k, v = projected
    k, v, padding, given = _extend(k, v, options)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = _merged_mask(given, padding, q, k.shape[2], is_causal=options.is_causal)
    q, k, v = (_rounded(quantizers, slot.value, t) for slot, t in zip(_ARGUMENTS, (q, k, v), strict=True))
    output, weights = _attend(quantizers, (q, k, v), mask, options)
    return _rounded(quantizers, Slot.ATTENTION_OUTPUT.value, output).transpose(1, 2).flatten(2), weights


def _extend(k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The learned and the zero key that ``add_bias_kv`` and ``add_zero_attn`` append."""
    extra: list[tuple[Tensor, Tensor]] = []
    padding, mask = options.padding, options.mask
    if options.bias_k is not None and options.bias_v is not None:
        extra.append((options.bias_k.expand(k.shape[0], 1, -1), options.bias_v.expand(v.shape[0], 1, -1)))
    if options.add_zero_attn:
        extra.append((torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])))
    for more_k, more_v in extra:
        k, v = torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1)
        padding = None if padding is None else F.pad(padding, (0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, padding, mask


def _attend(
    quantizers: Quantizers, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor | None]:
    q, k, v = qkv
    if not options.need_weights and quantizers.get(Slot.SOFTMAX.value) is None:
        return F.scaled_dot_product_attention(q, k, v, mask, options.dropout), None
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), options.dropout)
    output = _rounded(quantizers, Slot.SOFTMAX.value, weights) @ v
    return output, weights if options.need_weights else None


def functional_multihead(
    quantizers: Quantizers,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``F.multi_head_attention_forward`` computes, with rounded inputs of projections and attention.

    Args:
        quantizers: By ``MULTIHEAD_INPUTS`` and by slot.
        query: And the rest, as torch's function takes it; the weights come in rounded.

    Raises:
        RuntimeError: static keys or values, which torch itself never passes.
    """
    if static_k is not None or static_v is not None:
        raise RuntimeError("static_k and static_v cannot be simulated: pass keys and values")
    is_batched = query.dim() == 3
    inputs = [x.transpose(0, 1) if is_batched else x[None] for x in (query, key, value)]
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
        names = [MULTIHEAD_INPUTS[f"{letter}_proj_weight"] for letter in "qkv"]
    else:
        assert in_proj_weight is not None
        weights, names = list(in_proj_weight.chunk(3)), [MULTIHEAD_INPUTS["in_proj_weight"]] * 3
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    q, k, v = (
        F.linear(_rounded(quantizers, name, x), w, b)  # type: ignore[arg-type]
        for x, w, b, name in zip(inputs, weights, biases, names, strict=True)
    )
    padding = key_padding_mask if key_padding_mask is None or is_batched else key_padding_mask[None]
    options = _Options(
        bias_k, bias_v, add_zero_attn, dropout_p if training else 0.0, padding, attn_mask, is_causal, need_weights
    )
    output, probabilities = _attention(quantizers, (q, k, v), num_heads, options)
    output = F.linear(_rounded(quantizers, MULTIHEAD_INPUTS["out_proj_weight"], output), out_proj_weight, out_proj_bias)
    if probabilities is not None and average_attn_weights:
        probabilities = probabilities.mean(dim=1)
    if not is_batched:
        return output[0], None if probabilities is None else probabilities[0]
    return output.transpose(0, 1), probabilities


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
