"""The rows that meet a weight of a graph, and sums over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from octavo.backends.simulate import round_inputs
from octavo.numerics.arrays import tensor_of
from octavo.numerics.input_rounding import InputRounding
from octavo.numerics.observers import NotFiniteError
from octavo.numerics.statistics import Gatherer, InputStatistics, Need, kept_rows
from octavo.onnx.convolutions import rows_of
from octavo.onnx.graph import GraphSite
from octavo.onnx.pieces import Arrays
from octavo.spec.facts import Slot


def read_by(site: GraphSite) -> str:
    """The tensor that meets a weight."""
    return str(site.operands[Slot.INPUT].value.name)


def kernel_of(site: GraphSite) -> tuple[int, ...]:
    """Of a convolution; nothing for a matrix."""
    assert site.view is not None
    return site.view.shape[2:]


def is_grouped(site: GraphSite) -> bool:
    """A convolution in groups."""
    return site.product is not None and site.product.attributes.get_int("group", 1) > 1


def has_rows(site: GraphSite) -> bool:
    """Whether every row of the weight meets the same vectors; not so in groups."""
    return site.facts.operation == "linear" or (site.facts.operation == "conv" and not is_grouped(site))


def rows_at(site: GraphSite, value: np.ndarray[Any, Any]) -> Tensor:
    """``(rows, in_features)`` vectors that meet the weight."""
    x, node = tensor_of(value), site.product
    assert node is not None
    return rows_of(node, x, kernel_of(site)) if kernel_of(site) else x.flatten(0, -2)


class Rows:
    """Sums up what layers of a piece read: once for all that read the same tensor.

    Args:
        sites: Of the layers whose sums are wanted.
        needs: What to gather.
        tokens: Of every batch that will come: which positions hold no padding.
        pairs_all: ``CROSS`` is of all of them, not only of those that read what the first one reads.
        rounding: Layer -> how its input will be rounded: sums are then of what weights meet, and ``CROSS`` is there.
    """

    def __init__(
        self,
        sites: Mapping[str, GraphSite],
        needs: frozenset[Need],
        tokens: Sequence[Tensor | None],
        *,
        pairs_all: bool = False,
        rounding: Mapping[str, InputRounding] | None = None,
    ) -> None:
        self._rounding = rounding or {}
        self._sites, self._tokens = sites, tokens
        self._read = {name: read_by(site) for name, site in sites.items() if has_rows(site)}
        self._leaders = {name: name if kernel_of(sites[name]) else tensor for name, tensor in self._read.items()}
        self._sources = {leader: layer for layer, leader in reversed(self._leaders.items())}
        first = next(iter(self._leaders.values()), "")
        self._gatherers = {
            leader: Gatherer(needs if pairs_all or leader == first else needs - {Need.CROSS}, len(tokens))
            for leader in dict.fromkeys(self._leaders.values())
        }

    @property
    def tensors(self) -> list[str]:
        """What has to be looked at."""
        return list(dict.fromkeys(self._read.values()))

    def take(self, index: int, found: Arrays, full: Arrays | None) -> None:
        """Take in one batch, as the quantized path gave it, and as the unquantized one did."""
        for leader, gatherer in self._gatherers.items():
            layer, name = self._sources[leader], self._read[self._sources[leader]]
            site = self._sites[layer]
            rows = rows_at(site, found[name])
            other = None if full is None or Need.CROSS not in gatherer.needs else rows_at(site, full[name])
            rounding = self._rounding.get(layer)
            rounded = None if rounding is None else round_inputs(rows, rounding)
            kept = kept_rows(self._tokens[index], found[name].shape, len(rows))
            try:
                gatherer.update(rows, other, kept, rounded=rounded)
            except NotFiniteError as error:
                raise NotFiniteError(f"tensor '{name}': {error}") from error

    def statistics(self) -> dict[str, InputStatistics]:
        """Layer -> sums."""
        known = {leader: gatherer.statistics() for leader, gatherer in self._gatherers.items()}
        return {layer: known[leader] for layer, leader in self._leaders.items()}
