"""Fused attention written out, for a quantizer between its softmax and its second product."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def unfused_attention(
    rounded: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``F.scaled_dot_product_attention`` computes, with ``rounded`` probabilities.

    Softmax is computed in fp32, as the fused kernels do it. A query that no key may answer gives 0 as there.

    Args:
        rounded: What becomes of the probabilities, ``(..., queries, keys)``.
        query: ``(..., heads, queries, channels)``; the rest as torch's function takes it.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale @ key.transpose(-2, -1)).float()
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = torch.softmax(scores, -1).nan_to_num(0.0).to(query.dtype)
    return rounded(F.dropout(probabilities, dropout_p)) @ value
