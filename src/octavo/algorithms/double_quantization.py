"""Double quantization as a step (QLoRA, arXiv:2305.14314, section 3).

The plan's formats say already how scales are stored (``octavo.spec.double_quantization``), so every other step works
with the scales as they will be. What is left to do here is to name the layers that it did not change.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.numerics.block import Block
from octavo.numerics.statistics import Need
from octavo.spec.double_quantization import doubled, why_not_doubled
from octavo.spec.steps import DoubleQuantization
from octavo.spec.tensor_format import PLAIN_FP32, TensorFormat, one_level


class DoubleQuantizationAlgorithm:
    """See the module."""

    needs: frozenset[Need] = frozenset()
    preserves_function = True

    def __init__(self, options: DoubleQuantization) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Name the layers whose format has no scales that could be quantized."""
        formats = {layer: block.weight_spec(layer).format for layer in layers}
        return {
            layer: why_not_doubled(fmt) or "the plan was made without it"
            for layer, fmt in formats.items()
            if not self._is_done(fmt)
        }

    def _is_done(self, fmt: TensorFormat) -> bool:
        return fmt.scale not in (None, PLAIN_FP32) and fmt == doubled(one_level(fmt), self.options)
