"""Attention written out for rounded probabilities computes what torch's fused call computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.nn.attention import unfused_attention

MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, False]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": torch.zeros(4, 3).masked_fill(~MASK, float("-inf"))},
        {"attn_mask": torch.full((4, 3), torch.finfo(torch.float32).min)},
    ],
    ids=["plain", "scale", "causal", "mask with an empty row", "the same as numbers", "lowest numbers"],
)
def test_it_is_the_fused_call(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator) for n in (4, 3, 3))
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(unfused_attention(lambda x: x, query, key, value, **options), expected)
