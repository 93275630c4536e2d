"""A Gram matrix of few rows says more of these rows than of inputs: how far to trust it.

Rounding that makes up for errors exactly where the seen rows are blind to them does harm elsewhere. With fewer rows
than channels, or little more, the sample's Gram matrix is drawn towards that of white noise of the same energy, by as
much as makes the expected squared error of the estimate least: oracle approximating shrinkage (Chen, Wiesel, Eldar,
Hero, arXiv:0907.4698). With ``ENOUGH`` rows for every channel little would be left of that, and nothing is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 4
"""Rows for every channel."""


def shrinkage(gram: Tensor, num_rows: int) -> float:
    """How much of the estimate should be white, 0 to 1.

    Args:
        gram: ``(num_channels, num_channels)`` sum of ``x^T x``, in any scale.
        num_rows: Rows behind it.
    """
    width = gram.shape[0]
    # of a matrix and its square only the ratio counts
    largest = float(gram.diagonal().max()) if width else 0.0
    if not 0 < largest < float("inf"):
        return 1.0
    square = float((gram / largest).square().sum(dtype=torch.float64))
    trace = float((gram.diagonal() / largest).sum(dtype=torch.float64)) ** 2
    above = (1 - 2 / width) * square + trace
    below = (num_rows + 1 - 2 / width) * (square - trace / width)
    return 1.0 if above >= below else above / below


def shrunk(gram: Tensor, num_rows: int) -> Tensor:
    """``gram`` drawn towards a multiple of the identity with the same trace, where there are few rows."""
    if num_rows >= ENOUGH * gram.shape[0]:
        return gram
    share = shrinkage(gram, num_rows)
    mean = gram.diagonal().mean()
    if not bool(mean.isfinite()):
        return gram
    found = gram * (1 - share)
    found.diagonal().add_(share * mean)
    return found
