"""AWQ (arXiv:2306.00978): factors for input channels that make the weights round well where inputs are large.

Candidates are powers of the inputs' size, with and without the weights' own, on a grid of ``points``; the loss of each
is ``tr(E G E^T)`` from one Gram matrix (``numerics.rescaling``), so nothing is run again. ``clip`` then fixes the
weights with the scales that cost least, again from the Gram matrix: AWQ's clipping, over all that can be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octavo.numerics.door import Block, InputGroup
from octavo.numerics.layer_scales import Readings, searched, why_not_searched
from octavo.numerics.qtensor import quantize
from octavo.numerics.rescaling import Judge, Reader, power_scale
from octavo.numerics.statistics import Need
from octavo.spec.steps import Awq

Tie = Callable[[Tensor], Tensor]


class AwqAlgorithm:
    """See the module."""

    needs = frozenset({Need.SAMPLED_GRAM})

    def __init__(self, options: Awq) -> None:
        self.options = options

    @property
    def preserves_function(self) -> bool:
        """Factors do; clipping rounds."""
        return not self.options.clip

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Scale every group, then fix every weight."""
        left: dict[str, str] = {}
        for group in block.scale_groups():
            wanted = [layer for layer in group.layers if layer in layers]
            reason = _why_not(block, group, layers) if wanted else ""
            if reason and not self._is_clipped(block, group):
                left |= dict.fromkeys(wanted, reason)
            elif wanted and not reason:
                block.set_pre_scale(group, _searched_scale(block, group, self.options.points))
        if self.options.clip:
            for layer in (layer for layer in layers if layer not in left):
                scale, zero_point = searched(block, layer, "gram")
                fmt = block.weight_spec(layer).format
                block.fix_weight(layer, quantize(block.read_weight(layer), fmt, scale=scale, zero_point=zero_point))
        return left

    def _is_clipped(self, block: Block, group: InputGroup) -> bool:
        """What cannot be scaled (experts in one tensor, weights of functional calls) is clipped all the same."""
        return self.options.clip and not group.takes_scale and not why_not_searched(block, group.layers[0], "gram")


def _why_not(block: Block, group: InputGroup, layers: Sequence[str]) -> str:
    others = [layer for layer in group.layers if layer not in layers]
    if others:
        return f"'{others[0]}' reads the same tensor, and the step is not for it"
    if not group.takes_scale:
        return "its input cannot be scaled"
    if group.columns is not None:
        return "a channel of its input meets several columns: only layers where it meets one are scaled"
    return why_not_searched(block, group.layers[0], "gram")


def _searched_scale(block: Block, group: InputGroup, points: int) -> Tensor:
    readings = Readings.of(block, group)
    judge = readings.judge(block, lambda known: known.expected_gram / max(1, known.count))
    weights = (Reader.of(block.read_weight(layer), block.weight_spec(layer).format).weight for layer in group.layers)
    columns = torch.stack([weight.square().mean(0).sqrt() for weight in weights]).mean(0)
    return best_scale(judge, readings.mean_square.sqrt(), columns, points=points, tie=group.tie)


def best_scale(judge: Judge, inputs: Tensor, columns: Tensor, *, points: int, tie: Tie = lambda s: s) -> Tensor:
    """The candidate that costs least; all ones when none is better than nothing.

    Args:
        judge: Tells what a candidate costs.
        inputs: ``(in_features,)`` size of the inputs.
        columns: ``(in_features,)`` size of the weights' columns.
        points: Powers tried in each family.
        tie: Makes a candidate one that can be folded.
    """
    best, least = torch.ones_like(inputs), judge.loss(torch.ones_like(inputs))
    for candidate in _candidates(inputs, columns, points):
        scale = tie(candidate)
        loss = judge.loss(scale)
        if loss < least:
            best, least = scale, loss
    return best


def _candidates(inputs: Tensor, columns: Tensor, points: int) -> Iterator[Tensor]:
    for alpha in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        yield power_scale(inputs, None, alpha)
        yield power_scale(inputs, columns, alpha)
