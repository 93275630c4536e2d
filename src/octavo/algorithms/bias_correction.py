"""Bias correction as a step (Nagel et al., arXiv:1906.04721, section 4.2).

Rounding turns a weight ``W`` into ``W + E``, so outputs are off by ``E x``, and their means by ``E E[x]``. The bias
takes that out again; the means of the inputs come from the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.statistics import Need
from octavo.spec.steps import BiasCorrection


class BiasCorrectionAlgorithm:
    """See the module."""

    needs = frozenset({Need.MEAN, Need.UNROUNDED})
    preserves_function = False

    def __init__(self, options: BiasCorrection) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Correct every bias."""
        left: dict[str, str] = {}
        for layer in layers:
            reason = self._why_not(block, layer)
            if reason:
                left[layer] = reason
                continue
            mean = block.mean_input(layer)
            assert mean is not None
            shift = mean_shift(block.rounding_error(layer), mean)
            bias = block.read_bias(layer)
            if bias is None:
                block.add_bias(layer, -shift)
            else:
                block.write_bias(layer, bias.float() - shift)
        return left

    def _why_not(self, block: Block, layer: str) -> str:
        if block.mean_input(layer) is None:
            return "no means of its input were gathered"
        if block.read_weight(layer).ndim != 2:
            return "a stack of weights has no bias for each output"
        if block.read_bias(layer) is not None:
            return ""
        if not self.options.add:
            return "it has no bias; 'add: true' gives it one"
        return "" if block.takes_bias(layer) else "it has no bias and cannot be given one"


def mean_shift(error: Tensor, mean: Tensor) -> Tensor:
    """What an error of the weight adds to the mean of each output: ``E E[x]``, the equation of section 4.2.

    Args:
        error: ``(out_features, in_features)`` rounded weight minus weight.
        mean: ``(in_features,)`` mean of the inputs, or ``(out_features, in_features)`` where rows meet others.

    Returns:
        ``(out_features,)`` fp32; 0 for inputs without a mean.
    """
    return (error.float() * mean.float()).sum(-1)
