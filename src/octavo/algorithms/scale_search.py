"""Scale search as a step: every weight rounded to nearest, with the scales that cost least by the chosen measure."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.numerics.block import Block
from octavo.numerics.layer_scales import needs_of, searched, why_not_searched
from octavo.numerics.qtensor import quantize
from octavo.numerics.statistics import Need
from octavo.spec.steps import ScaleSearch


class ScaleSearchAlgorithm:
    """See the module."""

    preserves_function = False

    def __init__(self, options: ScaleSearch) -> None:
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """What the measure needs."""
        return needs_of(self.options.measure)

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Fix every weight."""
        left: dict[str, str] = {}
        for layer in layers:
            reason = why_not_searched(block, layer, self.options.measure)
            if reason:
                left[layer] = reason
                continue
            scale, zero_point = searched(block, layer, self.options.measure)
            fmt = block.weight_spec(layer).format
            block.fix_weight(layer, quantize(block.read_weight(layer), fmt, scale=scale, zero_point=zero_point))
        return left
