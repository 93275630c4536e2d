"""SmoothQuant as a step: the input of a group of layers is divided channel by channel, their columns are multiplied.

``alpha: search`` takes, for each group, the alpha whose outputs err least by the mean squares of the input: rounding of
the weights and of the input together (``numerics.rescaling``), without running anything again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.numerics.block import Block, InputGroup
from octavo.numerics.layer_scales import Readings
from octavo.numerics.rescaling import power_scale
from octavo.numerics.statistics import Need
from octavo.spec.steps import SmoothQuant

_NUM_ALPHAS = 19
_MOST_ALPHA = 0.9  # at 1, every channel reaches to the end of the range, and what calibration has not seen is cut off
_ALPHA_UNSEEN = 0.5  # where inputs differ from row to row, so that there is nothing to judge by


class SmoothQuantAlgorithm:
    """See the module."""

    preserves_function = True

    def __init__(self, options: SmoothQuant) -> None:
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """Ranges; mean squares to search alpha."""
        return frozenset({Need.RANGE, Need.MEAN_SQUARE} if self.options.alpha == "search" else {Need.RANGE})

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Scale every group whose input was seen."""
        left: dict[str, str] = {}
        for group in block.scale_groups():
            reason = self._why_not(block, group, layers)
            if reason:
                left |= dict.fromkeys((layer for layer in group.layers if layer in layers), reason)
                continue
            amax_x = channel_amax(Readings.of(block, group).amax, group)
            weights = torch.stack([block.read_weight(layer).float().abs().amax(0) for layer in group.layers])
            amax_w = channel_amax(weights.amax(0), group)
            block.set_pre_scale(group, self._scale(block, group, amax_x, amax_w))
        return left

    def _scale(self, block: Block, group: InputGroup, amax_x: Tensor, amax_w: Tensor) -> Tensor:
        if self.options.alpha != "search":
            return group.tie(power_scale(amax_x, amax_w, self.options.alpha))
        if group.columns is not None and group.columns.ndim > 1:  # a convolution in groups
            return group.tie(power_scale(amax_x, amax_w, _ALPHA_UNSEEN))
        judge = Readings.of(block, group).judge(block, lambda known: known.mean_square)
        alphas = torch.linspace(0, _MOST_ALPHA, _NUM_ALPHAS, dtype=torch.float64).tolist()
        scales = [group.tie(power_scale(amax_x, amax_w, alpha)) for alpha in alphas]
        return min([torch.ones_like(amax_x), *scales], key=lambda scale: judge.loss(group.per_column(scale)))

    @staticmethod
    def _why_not(block: Block, group: InputGroup, layers: Sequence[str]) -> str:
        others = [layer for layer in group.layers if layer not in layers]
        if others:
            return f"'{others[0]}' reads the same tensor, and the step is not for it"
        if not group.takes_scale:
            return "its input cannot be scaled channel by channel"
        return "" if any(block.statistics(layer).count for layer in group.layers) else "no input of it was seen as rows"


def channel_amax(values: Tensor, group: InputGroup) -> Tensor:
    """``(num_channels,)`` largest of ``(in_features,)`` values that belong to one channel."""
    if group.columns is None:
        return values
    return values.new_zeros(group.num_channels).scatter_reduce(0, group.columns, values, "amax")
