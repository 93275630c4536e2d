"""The walk over the pieces of a graph, and what waits between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.statistics import tokens_of
from octavo.numerics.store import Store
from octavo.onnx.blocks import GraphBlock
from octavo.onnx.calibration import Calibration
from octavo.onnx.pieces import Arrays, pieces_of

Entry = tuple[tuple[str, ...], int]
"""Arrays that wait in the store: their names, and the store's number."""


class GraphWalk:
    """``numerics.door.Walk`` for a graph.

    Args:
        calibration: The door's model, plan and what is found, which blocks add to.
        batches: As arrays.
        store: Where tensors between pieces wait.
        is_quantized: A piece is fed what simulated pieces give.
        keeps: The unquantized path is followed, too.
        folds_only: Layers whose input takes a scale only where a norm takes it in.
    """

    def __init__(
        self,
        calibration: Calibration,
        batches: Sequence[Arrays],
        store: Store,
        *,
        is_quantized: bool,
        keeps: bool,
        folds_only: AbstractSet[str] = frozenset(),
    ) -> None:
        self.folds_only = folds_only
        self.calibration = calibration
        self.store = store
        self.is_quantized = is_quantized
        self.keeps = keeps
        self.num_batches = len(batches)
        self.tokens = [tokens_of({name: tensor_of(value) for name, value in batch.items()}) for batch in batches]
        self.pieces = pieces_of(calibration.model, calibration.sites.values())
        self.live = [self.keep(batch) for batch in batches]
        self.full = [self.keep(batch) for batch in batches] if keeps else []

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[GraphBlock]:
        return (GraphBlock(self, piece) for piece in self.pieces)

    def keep(self, arrays: Arrays) -> Entry:
        """Let arrays wait."""
        return tuple(arrays), self.store.put([tensor_of(value) for value in arrays.values()])

    def get(self, entry: Entry) -> Arrays:
        """What waits."""
        names, key = entry
        return {name: array_of(value) for name, value in zip(names, self.store.get(key), strict=True)}

    def replace(self, entries: list[Entry], index: int, arrays: Arrays) -> None:
        """Something else waits from now on."""
        self.store.drop(entries[index][1])
        entries[index] = self.keep(arrays)
