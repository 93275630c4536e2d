"""Sums of products of bytes in saturating 16 bits, against the instruction spelled out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.numerics.saturation import conv_lost, lost
from octavo.numerics.windows import Geometry


def summed(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``(rows, in) x (out, in)`` as ``vpmaddubsw`` and a 32-bit sum give it."""
    odd = codes.shape[1] % 2
    a, w = (np.pad(m.astype(np.int32), ((0, 0), (0, odd))) for m in (codes, weight))
    pairs = a[:, None, 0::2] * w[None, :, 0::2] + a[:, None, 1::2] * w[None, :, 1::2]
    total: np.ndarray = np.clip(pairs, -32768, 32767).sum(-1)
    return total


@pytest.mark.parametrize("shape", [(3, 8, 5), (7, 385, 33), (1, 1, 1), (40, 600, 20)])
@pytest.mark.parametrize("spread", [20, 60, 400])
def test_what_sums_lose_is_what_the_instruction_drops(shape: tuple[int, int, int], spread: int) -> None:
    rng = np.random.default_rng(spread)
    rows, inner, out = shape
    codes = rng.integers(0, 256, (rows, inner))
    weight = np.clip(np.rint(rng.standard_normal((out, inner)) * spread), -128, 127).astype(np.int64)
    gone = lost(torch.tensor(codes), torch.tensor(weight)).numpy()
    assert (codes @ weight.T - gone == summed(codes, weight)).all()
    assert spread < 60 or inner < 8 or gone.any()


def test_seven_bits_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    codes, weight = rng.integers(0, 256, (50, 64)), rng.integers(-64, 65, (20, 64))
    assert not lost(torch.tensor(codes), torch.tensor(weight)).any()


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (3, 1), (12, 4), (6, 6)])
def test_a_convolution_sums_channels_of_one_position_together(channels: int, groups: int) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (2, channels, 7, 9))
    weight = rng.integers(-127, 128, (12, channels // groups, 3, 2))
    geometry = Geometry(((1, 0), (2, 1)), (2, 1), (1, 2), groups)
    gone = conv_lost(torch.tensor(codes), torch.tensor(weight), geometry, 9).numpy()
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 0), (2, 1)), constant_values=9)
    for n, o, i, j in np.ndindex(*gone.shape):
        part = slice(o // (12 // groups) * (channels // groups), (o // (12 // groups) + 1) * (channels // groups))
        window = padded[n, part, 2 * i : 2 * i + 3, j : j + 3 : 2].transpose(1, 2, 0).reshape(1, -1)
        kernel = weight[o].transpose(1, 2, 0).reshape(1, -1)
        expected = 0 if groups == channels else (window @ kernel.T - summed(window, kernel)).item()
        assert gone[n, o, i, j] == expected
    assert gone.any() or groups == channels
