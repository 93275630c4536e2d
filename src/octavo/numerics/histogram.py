"""A histogram that grows with its data and does not depend on the order in which they came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.errors import UserError

NUM_BINS = 4096
"""Bins on each side of zero; the largest magnitude falls into their upper half."""

_CHUNK = 1 << 20  # values binned at a time


class NotFiniteError(UserError):
    """Data contained NaN or inf. Whoever knows the quantizer's name raises it again with the name in front."""


def finite_extremes(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value of ``x``, which is not empty, in one pass.

    Raises:
        NotFiniteError: one of the values is NaN or inf.
    """
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()
    for value in (low, high):
        if not math.isfinite(value):
            word = "nan" if math.isnan(value) else "inf"
            raise NotFiniteError(
                f"calibration data gave {word}, and a range from it would mean nothing: "
                "check the inputs, or calibrate in a wider dtype"
            )
    return low, high


class Histogram:
    """Counts of values in bins of width ``2^exponent``; bin ``i`` is ``[i * width, (i + 1) * width)``, also below zero.

    When a larger value comes the width doubles until it fits: two bins become one, exactly. The state therefore
    depends on the values seen, not on their order or partition. It lives on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self.exponent = -126
        self.counts = torch.zeros(2 * NUM_BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Count every value of ``x``: one pass for its extremes, one for the bins.

        Raises:
            NotFiniteError: one of the values is NaN or inf; nothing was counted.
        """
        if not x.numel():
            return
        self._extend(x.numel(), *finite_extremes(x))
        for chunk in torch.split(x.detach().flatten(), _CHUNK):
            # Both operations are exact, so a value's bin is the same whenever it comes.
            bins = (chunk.float() * 2.0**-self.exponent).floor_().add_(NUM_BINS)
            self.counts += torch.bincount(bins.int(), minlength=2 * NUM_BINS).cpu()

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``, whose bins may be of another width."""
        self._extend(other.count, other.low, other.high)
        self.counts += _rebinned(other.counts, self.exponent - other.exponent)

    def _extend(self, count: int, low: float, high: float) -> None:
        if not count:
            return
        self.count, self.low, self.high = self.count + count, min(self.low, low), max(self.high, high)
        # frexp: the largest magnitude is in [2^(e - 1), 2^e), and NUM_BINS bins shall reach 2^e.
        exponent = math.frexp(max(-self.low, self.high))[1] - (NUM_BINS.bit_length() - 1)
        if exponent > self.exponent:
            self.counts = _rebinned(self.counts, exponent - self.exponent)
            self.exponent = exponent

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def amax(self) -> float:
        """The largest absolute value seen."""
        return max(-self.low, self.high)

    @property
    def centres(self) -> Tensor:
        """``(2 * NUM_BINS,)`` fp32 middles of the bins."""
        return (torch.arange(-NUM_BINS, NUM_BINS) + 0.5) * self.width

    @property
    def magnitudes(self) -> Tensor:
        """``(NUM_BINS,)`` counts of absolute values; the middles of the bins are the second half of ``centres``."""
        return self.counts[NUM_BINS:] + self.counts[:NUM_BINS].flip(0)


def _rebinned(counts: Tensor, doublings: int) -> Tensor:
    """Counts in bins ``2^doublings`` times as wide."""
    index = (torch.arange(-NUM_BINS, NUM_BINS) >> min(doublings, 62)) + NUM_BINS
    return torch.zeros_like(counts).index_add_(0, index, counts)
