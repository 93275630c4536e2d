"""GPTQ as a step (arXiv:2210.17323): ``numerics.error_feedback`` on every layer, scales searched beforehand.

``asymmetric`` is the calibration of GPTAQ (arXiv:2504.02692): the weight first moves to where it best serves the
drifted inputs that the quantized blocks before give. Only layers that read the block's own input know their drift:
what the block's other layers will read changes again when these are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.numerics.door import Block
from octavo.numerics.error_feedback import Feedback, round_with_feedback
from octavo.numerics.layer_scales import agreed_outer, needs_of, why_not_searched
from octavo.numerics.linalg import compensated
from octavo.numerics.scale_search import PLAIN, Weighting, search_scales
from octavo.numerics.statistics import Need
from octavo.spec.steps import Gptq


class GptqAlgorithm:
    """See the module."""

    preserves_function = False

    def __init__(self, options: Gptq) -> None:
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """The Gram matrix, and the cross product for ``asymmetric``."""
        cross = frozenset({Need.CROSS}) if self.options.asymmetric else frozenset()
        return frozenset({Need.GRAM, Need.QUANTIZED}) | needs_of(self.options.scales) | cross

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Fix every weight."""
        first = set(block.groups()[0].layers) if block.groups() else set()
        left: dict[str, str] = {}
        for layer in layers:
            reason = why_not_searched(block, layer, "gram")
            if reason:
                left[layer] = reason
            else:
                self._fix(block, layer, reads_input=layer in first)
        return left

    def _fix(self, block: Block, layer: str, *, reads_input: bool) -> None:
        statistics, options = block.statistics(layer), self.options
        weight, fmt, gram = block.read_weight(layer), block.weight_spec(layer).format, statistics.expected_gram
        if options.asymmetric and reads_input and statistics.cross is not None:
            assert statistics.gram is not None
            weight = compensated(weight, statistics.gram, statistics.cross - statistics.gram, options.damping)
        measures = {"plain": PLAIN, "importance": Weighting(importance=gram.diagonal()), "gram": Weighting(gram=gram)}
        scale, zero_point = search_scales(weight, fmt, measures[options.scales], outer=agreed_outer(block, layer))
        how = Feedback(options.damping, options.act_order, options.block_size, options.sweeps)
        block.fix_weight(layer, round_with_feedback(weight, gram, fmt, scale=scale, zero_point=zero_point, options=how))
