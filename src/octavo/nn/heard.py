"""What forwards of a block told of the inputs of its layers, kept true while steps change those inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

from torch import Tensor

from octavo.nn.block_parts import BlockParts
from octavo.nn.ears import Ears
from octavo.numerics.block import InputGroup, site_of
from octavo.numerics.statistics import InputStatistics

Change = Callable[[InputStatistics], InputStatistics]


class Heard:
    """Statistics by layer: layers that read one tensor share those of the first of them, their leader.

    Args:
        parts: Of the block.
    """

    def __init__(self, parts: BlockParts) -> None:
        self._parts = parts
        self.leader: dict[str, str] = {}
        """Layer -> the first that reads the same tensor; empty where nothing was heard."""
        self._channels: dict[str, int] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._means: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._changes: dict[str, list[Change]] = {}

    def take(self, ears: Ears) -> None:
        """All that was heard in a pass."""
        self.leader, self._channels, self._calls = ears.leader, ears.channels, ears.calls
        self._statistics = {name: gatherer.statistics() for name, gatherer in ears.gatherers.items()}
        self._means = {name: total / count for name, (total, count) in ears.sums.items()}

    def take_again(self, ears: Ears) -> None:
        """What some layers read now."""
        self._statistics |= {name: gatherer.statistics() for name, gatherer in ears.gatherers.items()}

    def forget(self) -> None:
        """Statistics are not needed any more."""
        self._statistics = {}

    def layers(self) -> list[str]:
        """All layers, those that were heard first, in the order of the forward pass."""
        return [*self.leader, *(name for name in self._parts.by_name if name not in self.leader)]

    def leader_of(self, layer: str) -> str:
        """The first that reads the same tensor; the layer itself where nothing is known."""
        return self.leader.get(layer, layer)

    def readers(self) -> dict[str, list[str]]:
        """Leader -> all that read its tensor."""
        found: dict[str, list[str]] = {}
        for name in self.layers():
            found.setdefault(self.leader_of(name), []).append(name)
        return found

    def num_channels(self, leader: str, otherwise: int) -> int:
        """Of the tensor that was read."""
        return self._channels.get(leader, otherwise)

    def statistics(self, layer: str) -> InputStatistics:
        """See ``Block.statistics``."""
        known = self._statistics.get(self.leader_of(layer))
        if known is not None and known.count:
            return known
        stack = self._parts.stacks.get(site_of(layer))
        if stack is None or not any(matrix.name in self.leader for matrix in stack.matrices):
            return InputStatistics(0)
        white = InputStatistics.white(self._parts[layer].matrix.shape[-1], stack.layer.parameter.device)
        return reduce(lambda known, change: change(known), self._changes.get(layer, []), white)

    def mean_input(self, layer: str) -> Tensor | None:
        """See ``Block.mean_input``."""
        known = self.statistics(layer)
        if known.total is not None and known.count:
            return known.mean
        mean = self._means.get(self.leader_of(layer))
        if mean is None:
            return None
        rows, width = self._parts.layers[layer].quantizer.view.matrix_shape
        groups = mean.view(-1, width)
        return groups.repeat_interleave(rows // groups.shape[0], 0)

    def change(self, layers: Sequence[str], change: Change) -> None:
        """Something was done to the input of these layers."""
        for leader in dict.fromkeys(map(self.leader_of, layers)):
            known = self._statistics.get(leader)
            if known is not None and known.count:
                self._statistics[leader] = change(known)
            else:  # what is assumed of it is made when asked for
                self._changes.setdefault(leader, []).append(change)

    def divide(self, group: InputGroup, scale: Tensor) -> None:
        """The input of a group was divided by ``(num_channels,)`` ``scale``."""
        self.change(group.layers, lambda known: known.divided_by(group.per_column(scale)))
        leader = self.leader_of(group.layers[0])
        if leader in self._means:
            mean = self._means[leader]
            self._means[leader] = mean / scale.repeat_interleave(mean.shape[0] // scale.shape[0])

    def once_heard(self, layers: Iterable[str], num_batches: int) -> int:
        """How many inputs of these layers a forward gives, where each comes once; 0 where that is not known."""
        leaders = {self.leader.get(name, "") for name in layers}
        once = all(self._calls[leader] == num_batches for leader in leaders)
        return len(leaders) if once else 0
