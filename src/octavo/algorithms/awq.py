"""AWQ (arXiv:2306.00978): factors for input channels that make the weights round well where inputs are large.

Candidates are powers of the inputs' size, with and without the weights' own: ``points`` of each, of which first a few
far apart are tried and then those around the best. Nothing is run again to judge them (``numerics.rescaling``).
``clip`` fixes the weights with the scales that cost least by the Gram matrix (AWQ's clipping, over all that can be
stored), so candidates are then judged with scales that are searched for, too; without it by rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from octavo.numerics.block import Block, InputGroup
from octavo.numerics.layer_scales import Readings, searched, why_not_searched
from octavo.numerics.qtensor import quantize
from octavo.numerics.rescaling import Judge, Reader, power_scale
from octavo.numerics.statistics import InputStatistics, Need
from octavo.spec.steps import Awq

Tie = Callable[[Tensor], Tensor]
Candidate = tuple[bool, int]
"""Whether weights count, and which power."""
_COARSE = 4  # intervals at least of the first look


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
                block.set_pre_scale(group, self._scale(block, group))
        if self.options.clip:
            for layer in (layer for layer in layers if layer not in left):
                reason = why_not_searched(block, layer, "gram")
                if reason:
                    left[layer] = reason
                    continue
                scale, zero_point = searched(block, layer, "gram")
                fmt = block.weight_spec(layer).format
                block.fix_weight(layer, quantize(block.read_weight(layer), fmt, scale=scale, zero_point=zero_point))
        return left

    def _scale(self, block: Block, group: InputGroup) -> Tensor:
        readings = Readings.of(block, group)
        judge = readings.judge(block, self._gram, is_searched=self.options.clip)
        formats = ((block.read_weight(layer), block.weight_spec(layer).format) for layer in group.layers)
        columns = torch.stack([Reader.of(*both).weight.square().mean(0).sqrt() for both in formats]).mean(0)
        return best_scale(judge, readings.mean_square.sqrt(), columns, points=self.options.points, tie=group.tie)

    def _gram(self, known: InputStatistics) -> Tensor:
        return known.mean_square if self.options.clip else known.expected_gram / max(1, known.count)

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
    return why_not_searched(block, _first_seen(block, group), "gram")


def _first_seen(block: Block, group: InputGroup) -> str:
    """The first layer that rows have reached; the first of all where none was."""
    return next((layer for layer in group.layers if block.statistics(layer).count), group.layers[0])


def best_scale(judge: Judge, inputs: Tensor, columns: Tensor, *, points: int, tie: Tie = lambda s: s) -> Tensor:
    """The candidate that costs least of those tried; all ones when none is better than nothing.

    Args:
        judge: Tells what a candidate costs.
        inputs: ``(in_features,)`` size of the inputs.
        columns: ``(in_features,)`` size of the weights' columns.
        points: Powers in each family, 0 to 1: every so many are tried, then those between, around the best.
        tie: Makes a candidate one that can be folded.
    """
    tried: dict[Candidate, tuple[float, Tensor]] = {}

    def loss(candidate: Candidate) -> float:
        if candidate not in tried:
            down, power = candidate
            scale = tie(power_scale(inputs, columns if down else None, power / (points - 1)))
            tried[candidate] = judge.loss(scale), scale
        return tried[candidate][0]

    stride = 1 << max(0, ((points - 1) // _COARSE).bit_length() - 1)
    best = min(product((False, True), range(0, points, stride)), key=loss)
    while stride > 1:
        stride //= 2
        family, power = best
        near = [(family, beside) for beside in (power, power - stride, power + stride) if 0 <= beside < points]
        best = min(near, key=loss)
    least, scale = tried[best]
    return scale if least < judge.loss(torch.ones_like(inputs)) else torch.ones_like(inputs)
