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

    Softmax is computed in fp32, as the fused kernels do it. A query that no key may answer gives 0 as there. Nothing
    stands between the softmax and ``rounded``, nor between that and the product: engines fuse only that.

    Args:
        rounded: What becomes of the probabilities, ``(..., queries, keys)``.
        query: ``(..., heads, queries, channels)``; the rest as torch's function takes it.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale @ key.transpose(-2, -1)).float()
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, lowest)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = scores + attn_mask.float().clamp_min(lowest)
    probabilities = torch.softmax(scores, -1).to(query.dtype)
    output = rounded(F.dropout(probabilities, dropout_p)) @ value
    return output if attn_mask is None else output.masked_fill(~_is_answered(attn_mask), 0.0)


def _is_answered(attn_mask: Tensor) -> Tensor:
    """``(..., queries, 1)``: whether a query may see any key."""
    visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")
    return visible.any(-1, keepdim=True)
