"""What an error of a weight costs: inner products of blocks, plain, by importance, or by the Gram matrix of inputs.

Legend: N rows, G groups in a row, S values in a group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.spec.tensor_format import Granularity, PerChannel, PerFlatGroup, PerGroup, PerTensor, PerTile, PerToken


@dataclass(frozen=True, slots=True)
class Weighting:
    """What an error at each input costs; nothing given: all the same.

    Args:
        importance: ``(in_features,)`` mean of the squared input.
        gram: ``(in_features, in_features)`` ``X^T X`` of the inputs, in any scale. Only its part inside each
            block counts. Where a format's blocks are not runs of one row, its diagonal counts.
    """

    importance: Tensor | None = None
    gram: Tensor | None = None


PLAIN = Weighting()


class BlockMeasure(ABC):
    """An inner product of blocks."""

    may_alias = True
    """``dot`` takes one tensor twice."""

    @abstractmethod
    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """``(N, G)`` products of ``(N, G, S)`` blocks; ``b`` may be overwritten."""

    @abstractmethod
    def part(self, rows: slice) -> BlockMeasure:
        """The measure of some of the rows."""

    @abstractmethod
    def least(self, at: Tensor) -> Tensor:
        """``(N, G)`` lower bound of what an error of 1 costs at position ``at`` ``(N, G, 1)``, whatever the others."""


class _Plain(BlockMeasure):
    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return _sum_last(b.mul_(a))

    def part(self, rows: slice) -> BlockMeasure:
        return self

    def least(self, at: Tensor) -> Tensor:
        return torch.ones_like(at, dtype=torch.float32).squeeze(-1)


class _Diagonal(BlockMeasure):
    """``weights`` is ``(1 or N, G, S)``."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return _sum_last(b.mul_(a).mul_(self.weights))

    def part(self, rows: slice) -> BlockMeasure:
        return self if self.weights.shape[0] == 1 else _Diagonal(self.weights[rows])

    def least(self, at: Tensor) -> Tensor:
        return self.weights.expand(at.shape[0], -1, -1).gather(-1, at).squeeze(-1)


class _Quadratic(BlockMeasure):
    """``blocks`` is ``(G, S, S)``."""

    may_alias = False

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        through = torch.bmm(a.transpose(0, 1), self.blocks).transpose(0, 1)
        return _sum_last(b.mul_(through))

    def part(self, rows: slice) -> BlockMeasure:
        return self

    def least(self, at: Tensor) -> Tensor:
        return torch.zeros_like(at, dtype=torch.float32).squeeze(-1)


def measure_of(weighting: Weighting, x: Tensor, granularity: Granularity) -> BlockMeasure:
    """The measure of errors of ``x`` in groups of ``granularity``."""
    in_rows = x.ndim > 1 and isinstance(granularity, PerGroup | PerChannel | PerToken)
    if weighting.gram is not None and in_rows:
        gram = weighting.gram.float()
        size = granularity.size if isinstance(granularity, PerGroup) else gram.shape[0]
        # a mean diagonal of 1 keeps sums of squares far from the ends of fp32
        gram = gram / gram.diagonal().mean().clamp(min=1e-30)
        if not (isinstance(granularity, PerChannel) and granularity.axis % x.ndim != x.ndim - 2):
            return _Quadratic(_diagonal_blocks(gram, size))
    importance = weighting.importance if weighting.gram is None else weighting.gram.diagonal()
    if importance is None:
        return _Plain()
    weights = importance.float() / importance.float().mean().clamp(min=1e-30)
    # what no calibration input reached still counts a little: new inputs may
    weights = weights.clamp(min=1e-4)
    whole = weights.view(1, -1) if isinstance(granularity, PerGroup) else weights.expand(x.shape)
    return _Diagonal(grouped(whole, granularity))


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """``(G, S, S)`` blocks, the last one filled with zeros, each with a little weight of its own on the diagonal."""
    missing = -gram.shape[0] % size
    padded = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    count = padded.shape[0] // size
    blocks = torch.stack([padded[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    return blocks + 1e-3 * torch.eye(size, dtype=gram.dtype, device=gram.device)


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` as ``(N, G, S)`` fp32, the groups in the order of the scale tensor; short last groups end with zeros."""
    match granularity:
        case PerGroup(size):
            missing = -x.shape[-1] % size
            padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
            return padded.reshape(-1, padded.shape[-1] // size, size).float()
        case PerChannel() | PerToken():
            return x.reshape(math.prod(granularity.scale_shape(tuple(x.shape))), 1, -1).float()
        case PerTensor():
            return x.reshape(1, 1, -1).float()
        case PerFlatGroup(size):
            flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % size))
            return flat.view(-1, 1, size).float()
        case PerTile(rows, cols):
            padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % cols, 0, -x.shape[-2] % rows))
            high, wide = padded.shape[-2] // rows, padded.shape[-1] // cols
            tiles = padded.reshape(-1, high, rows, wide, cols).transpose(2, 3)
            return tiles.reshape(-1, 1, rows * cols).float()


def _sum_last(values: Tensor) -> Tensor:
    """Sums along the last axis, short rows folded first: torch is slow at reducing them on a CPU."""
    while values.shape[-1] < 64 and values.shape[-1] % 2 == 0:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.sum(-1)
