"""Hears what layers of a block read, and sums it up: once for all that read the same tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from octavo.backends.simulate import round_inputs
from octavo.nn.block_layers import BlockLayer
from octavo.numerics.input_rounding import InputRounding
from octavo.numerics.observers import NotFiniteError
from octavo.numerics.statistics import Gatherer, Need, kept_rows


class Enough(Exception):
    """Everything that was listened for in a forward has been heard."""


class Ears:
    """Told of every input.

    Args:
        layers: Sites by name.
        needs: What to gather.
        num_batches: How often rows will come.
        pairs: Inputs come by the unquantized path first, and then by the quantized one.
        leader: Layer -> the first that reads the same tensor, where that is known; pairs are then of interest for all
            of them, else for those that read what the first layer reads.
        rounding: Layer -> how its input will be rounded: sums are then of what weights meet, and ``CROSS`` is there.
        enough: Inputs of modules after which a forward is ended by ``Enough``; 0: it runs to its end.
    """

    def __init__(
        self,
        layers: Mapping[str, BlockLayer],
        needs: frozenset[Need],
        num_batches: int,
        *,
        pairs: bool,
        leader: Mapping[str, str] | None = None,
        rounding: Mapping[str, InputRounding] | None = None,
        enough: int = 0,
    ) -> None:
        self.layers = layers
        self.num_batches = num_batches
        self.needs = needs if pairs else needs - {Need.CROSS}
        self.leader: dict[str, str] = dict(leader or {})
        self._pairs_all = leader is not None
        self._rounding = rounding or {}
        self.channels: dict[str, int] = {}
        self.gatherers: dict[str, Gatherer] = {}
        self._heard: dict[tuple[int, int, object], tuple[Tensor, int, str]] = {}
        self.sums: dict[str, tuple[Tensor, int]] = {}
        """Convolution in groups -> sum of the patches that its kernel meets, all channels, and how many they are."""
        self._is_first = False
        self._first: dict[str, list[Tensor]] = {}
        self._enough, self._in_forward = enough, 0
        self.calls: Counter[str] = Counter()
        """Layer -> times that it was heard."""
        self.tokens: Tensor | None = None
        """``(batch, length)``: which positions of the batch that runs hold no padding; ``None`` for all."""

    def hear(self, name: str, x: Tensor) -> None:
        """Layer ``name`` reads ``x``."""
        layer = self.layers[name]
        if not self._leads(name, x, -1, lambda: layer.num_channels(x), layer.geometry):
            return
        rows = layer.rows(x)
        if rows is None:
            self._add_patches(name, layer, x)
            return
        is_paired = Need.CROSS in self.needs and (self._pairs_all or name == next(iter(self.leader)))
        if self._is_first:
            self._first.setdefault(name, []).extend([rows] if is_paired else ())
        else:
            full = self._first[name].pop(0) if is_paired else None
            self._take(name, x, (rows, full), self.needs if is_paired else self.needs - {Need.CROSS})
            self.calls[name] += 1
        self._in_forward += 1
        if self._in_forward == self._enough:
            raise Enough

    def _add_patches(self, name: str, layer: BlockLayer, x: Tensor) -> None:
        if Need.MEAN not in self.needs or self._is_first or not layer.is_grouped:
            return
        for sample in x if x.ndim == layer.parameter.ndim else x.unsqueeze(0):  # one at a time: patches are many
            patches = layer.patches(sample).float()
            total, count = self.sums.get(name, (patches.new_zeros(patches.shape[1]), 0))
            self.sums[name] = total + patches.sum(0), count + patches.shape[0]

    def hear_part(self, name: str, x: Tensor, part: int, rows: Tensor) -> None:
        """One matrix of a stack, or a weight of a functional call, reads ``rows`` of ``x``.

        Which rows an expert gets differs between two paths through the model, so there are no pairs of them.
        """
        if not self._is_first and self._leads(name, x, part, lambda: rows.shape[-1]):
            self._take(name, x, (rows, None), self.needs - {Need.CROSS})

    def _leads(self, name: str, x: Tensor, part: int, num_channels: Callable[[], int], geometry: object = None) -> bool:
        """Whether ``name`` is the first of those that read ``x`` alike."""
        if name not in self.leader:
            version = -1 if x.is_inference() else x._version
            known = self._heard.get((id(x), part, geometry))
            is_same = known is not None and known[0] is x and known[1] == version
            leader = known[2] if known is not None and is_same else name
            self._heard.setdefault((id(x), part, geometry), (x, version, leader))
            self.leader[name] = leader
            self.channels[name] = num_channels()
        return self.leader[name] == name

    def _take(self, name: str, x: Tensor, pair: tuple[Tensor, Tensor | None], needs: frozenset[Need]) -> None:
        rows, full = pair
        rounding = self._rounding.get(name)
        rounded = None if rounding is None else round_inputs(rows, rounding)
        kept = kept_rows(self.tokens, x.shape, rows.shape[0])  # what an expert gets is no text
        kept = None if kept is None else kept.to(rows.device)
        try:
            self.gatherers.setdefault(name, Gatherer(needs, self.num_batches)).update(rows, full, kept, rounded=rounded)
        except NotFiniteError as error:
            raise NotFiniteError(f"layer '{name}': {error}") from error

    @contextmanager
    def first_of_pair(self) -> Iterator[None]:
        """While open, inputs are those of the unquantized path, and wait for their partners."""
        self._is_first = Need.CROSS in self.needs
        try:
            yield
        finally:
            self._is_first = False
            self._in_forward = 0
            self._heard.clear()

    def forget(self) -> None:
        """A forward is over."""
        self._in_forward = 0
        self._heard.clear()
        self._first.clear()
