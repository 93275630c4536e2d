"""``nn.MultiheadAttention`` in all its forms computes as torch's when nothing is rounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from octavo.nn.multihead import QuantMultiheadAttention

MASKS = ("none", "bool", "float", "three", "padding", "both")


def masks(kind: str, batch: int, heads: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
    future = torch.triu(torch.ones(queries, keys, dtype=torch.bool), 1)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -1] = True
    return {
        "none": {},
        "bool": {"attn_mask": future},
        "float": {"attn_mask": torch.randn(queries, keys)},
        "three": {"attn_mask": torch.randn(batch * heads, queries, keys)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": future, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize(
    ("mask", "batch_first", "need_weights"), list(itertools.product(MASKS, (True, False), (True, False)))
)
def test_equals_torch(mask: str, batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    query, key = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    options = {**masks(mask, 2, 4, 5, 5), "need_weights": need_weights}
    check(attention, (query, key, key), options)


@pytest.mark.parametrize(
    "extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 20}, {"bias": False}]
)
def test_options_equal_torch(extra: dict[str, object]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True, **extra).eval()
    key, value = torch.randn(2, 6, attention.kdim), torch.randn(2, 6, attention.vdim)
    check(attention, (torch.randn(2, 5, 16), key, value), {"attn_mask": torch.randn(5, 6)})


def test_unbatched_equals_torch() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4).eval()
    check(attention, (torch.randn(5, 16), torch.randn(6, 16), torch.randn(6, 16)), {"average_attn_weights": False})


def check(attention: nn.MultiheadAttention, inputs: tuple[torch.Tensor, ...], options: dict[str, object]) -> None:
    with torch.no_grad():
        expected, expected_weights = attention(*inputs, **options)
        attention.__class__ = QuantMultiheadAttention
        found, found_weights = attention(*inputs, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if expected_weights is not None:
        torch.testing.assert_close(found_weights, expected_weights, rtol=1e-5, atol=1e-6)
