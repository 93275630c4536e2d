"""What an algorithm is: a thin adapter between a block and a pure solver on tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from octavo.numerics.block import Block
from octavo.numerics.statistics import Need


class Algorithm(Protocol):
    """One step of a recipe, with its options. ``octavo.algorithms.base`` tells how to write one."""

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be gathered before ``apply``."""
        ...

    @property
    def preserves_function(self) -> bool:
        """The block computes the same afterwards, as long as nothing is rounded. The runner checks it on a batch."""
        ...

    def apply(self, block: Block, layers: Sequence[str]) -> Mapping[str, str]:
        """Work on one block.

        Args:
            block: The block, in full precision.
            layers: Those of ``block.layers()`` that the step is for.

        Returns:
            Layer -> why nothing was done to it; empty when every layer was served.

        Raises:
            UserError: something is wrong with the model, the data or the options; the message names the layer.
        """
        ...
