"""Cross-layer equalization (Nagel et al., arXiv:1906.04721, equation 11): two layers in a row share ranges fairly.

Where a layer's output reaches only the layers of one group, and nothing between them minds a positive factor, each
channel is scaled so that the largest weight that makes it equals the largest weight that reads it. Needs no data; made
for convolutions with one scale per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.numerics.block import Block, InputGroup
from octavo.numerics.statistics import Need
from octavo.spec.steps import Equalize


class EqualizeAlgorithm:
    """See the module."""

    needs: frozenset[Need] = frozenset()
    preserves_function = True

    def __init__(self, options: Equalize) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Scale every pair."""
        left: dict[str, str] = {}
        for _ in range(self.options.rounds):
            left = {}
            for group in block.groups():
                reason = _why_not(block, group)
                if reason:
                    left |= {layer: reason for layer in group.layers if layer in layers}
                elif all(layer in layers for layer in group.layers):
                    block.set_pre_scale(group, group.tie(_scale(block, group)))
        return left


def _why_not(block: Block, group: InputGroup) -> str:
    if group.fold is None or not group.takes_scale:
        return "no layer before it can take the other half of a factor"
    if group.columns is not None and group.columns.ndim > 1:
        return "in a convolution in groups a column meets several channels"
    return "" if group.fold.producer in block.layers() else f"'{group.fold.producer}' before it has no quantized weight"


def _scale(block: Block, group: InputGroup) -> Tensor:
    assert group.fold is not None
    makes = block.read_weight(group.fold.producer).float().abs().amax(-1)[group.fold.sources]
    columns = torch.stack([block.read_weight(layer).float().abs().amax(0) for layer in group.layers]).amax(0)
    reads = columns
    if group.columns is not None:
        reads = columns.new_zeros(group.num_channels).scatter_reduce(0, group.columns, columns, "amax")
    return equalizing_scale(makes, reads)


def equalizing_scale(makes: Tensor, reads: Tensor) -> Tensor:
    """``sqrt(makes / reads)``; 1 for a channel where either is 0.

    Args:
        makes: ``(num_channels,)`` largest absolute weight that makes each channel.
        reads: ``(num_channels,)`` largest absolute weight that reads it.
    """
    live = (makes > 0) & (reads > 0)
    return torch.where(live, (makes / reads.clamp(min=1e-30)).sqrt().clamp(1e-4, 1e4), 1.0)
