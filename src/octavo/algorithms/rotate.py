"""Rotation as a step: Hadamard blocks on a layer's input at run time, and on its weight's columns beforehand.

Streams of the whole model are rotated in the weights alone, before the first block (``Door.rotate``); here is what was
not. QuaRot (arXiv:2404.00456) spreads outliers over all channels; MR-GPTQ (arXiv:2509.23202) rotates blocks of the
format's own group size, which is cheap at run time and evens out each group.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.numerics.block import Block, InputGroup
from octavo.numerics.hadamard import has_hadamard, largest_block
from octavo.numerics.statistics import Need
from octavo.spec.steps import Rotate
from octavo.spec.tensor_format import PerGroup


class RotateAlgorithm:
    """See the module."""

    needs: frozenset[Need] = frozenset()
    preserves_function = True

    def __init__(self, options: Rotate) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Rotate every group of linear layers."""
        left: dict[str, str] = {}
        for group in block.placed_groups():
            wanted = [layer for layer in group.layers if layer in layers]
            if not wanted:
                continue
            others = [layer for layer in group.layers if layer not in layers]
            if all(block.is_turned(layer) for layer in group.layers):
                continue
            size = self._block_size(block, group)
            if "online" not in self.options.where:
                reason = "what it reads lies in no stream that is rotated in the weights"
            elif others:
                reason = f"'{others[0]}' reads the same tensor, and the step is not for it"
            elif group.columns is not None or not group.takes_scale:
                reason = "only inputs of linear layers are rotated"
            elif size < 2:
                reason = f"no Hadamard matrix of the wanted size divides {group.num_channels} channels"
            else:
                block.set_input_rotation(group, size)
                continue
            left |= dict.fromkeys(wanted, reason)
        return left

    def _block_size(self, block: Block, group: InputGroup) -> int:
        """The size asked for, the format's group size, or the largest that divides the channels; 0 where none fits."""
        match self.options.block:
            case "whole":
                return largest_block(group.num_channels)
            case "group":
                granularity = block.weight_spec(group.layers[0]).format.granularity
                if not isinstance(granularity, PerGroup):
                    return largest_block(group.num_channels)
                size = granularity.size
            case int() as size:
                pass
        fits = group.num_channels % size == 0 and has_hadamard(size)
        return size if fits else 0
