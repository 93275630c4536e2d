"""GPTQ as a step (arXiv:2210.17323): ``numerics.error_feedback`` on every layer, scales searched beforehand.

``asymmetric`` is the calibration of GPTAQ (arXiv:2504.02692): the weight first moves to where it best serves the
drifted inputs that quantized layers before give. All layers know their drift with ``sequential``, which looks at inputs
again once the layers before are rounded; without it only those that read the block's own input do.

``rounded_inputs`` takes what an input's own quantizer rounds away as drift, too; ``numerics.drift`` says why half
of it is made up for.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.numerics.block import Block, site_of
from octavo.numerics.drift import compensated
from octavo.numerics.error_feedback import Feedback, round_with_feedback
from octavo.numerics.layer_scales import agreed_outer, needs_of, why_not_searched
from octavo.numerics.scale_search import search_scales
from octavo.numerics.statistics import Need
from octavo.numerics.weighting import PLAIN, Weighting
from octavo.spec.steps import Gptq

_PART_OF_NOISE = 0.5  # of the step that makes up for drift, where drift is what an input's quantizer rounds away


class GptqAlgorithm:
    """See the module."""

    preserves_function = False

    def __init__(self, options: Gptq) -> None:
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """The Gram matrix; for ``asymmetric`` the cross product, and with ``sequential`` what weights were."""
        both = {Need.CROSS, Need.UNROUNDED} if self.options.sequential else {Need.CROSS}
        cross = frozenset(both if self.options.asymmetric else ())
        return frozenset({Need.GRAM, Need.QUANTIZED}) | needs_of(self.options.scales) | cross

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Fix every weight, those that read one tensor after those whose outputs make it."""
        left = {layer: reason for layer in layers if (reason := why_not_searched(block, layer, "gram"))}
        chosen, options = [layer for layer in layers if layer not in left], self.options
        rounded = [layer for layer in chosen if block.input_spec(layer) is not None] if options.rounded_inputs else []
        if rounded and not options.sequential:
            block.gather_again(rounded, rounded=True)
        for number, together in enumerate(_in_turn(block, chosen)):
            if options.sequential and (number or set(together) & set(rounded)):
                block.gather_again(together, rounded=options.rounded_inputs)
            for layer in together:
                self._fix(block, layer)
        return left

    def _fix(self, block: Block, layer: str) -> None:
        statistics, options = block.statistics(layer), self.options
        weight, fmt, gram = block.read_weight(layer), block.weight_spec(layer).format, statistics.expected_gram
        if (options.asymmetric or options.rounded_inputs) and statistics.cross is not None:
            part = _PART_OF_NOISE if options.rounded_inputs else 1.0
            weight = compensated(weight, statistics, options.damping, part=part)
        measures = {"plain": PLAIN, "importance": Weighting(importance=gram.diagonal()), "gram": Weighting(gram=gram)}
        scale, zero_point = search_scales(weight, fmt, measures[options.scales], outer=agreed_outer(block, layer))
        how = Feedback(options.damping, options.act_order, options.block_size, options.sweeps)
        block.fix_weight(layer, round_with_feedback(weight, gram, fmt, scale=scale, zero_point=zero_point, options=how))


def _in_turn(block: Block, layers: Sequence[str]) -> list[list[str]]:
    """Layers in the order of the forward pass; those that read one tensor, and matrices of one stack, together."""
    chosen, turns = set(layers), dict[str, list[str]]()
    for group in block.groups():
        turns.setdefault(site_of(group.layers[0]), []).extend(name for name in group.layers if name in chosen)
    return [together for together in turns.values() if together]
