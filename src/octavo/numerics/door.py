"""The two protocols everything above the wings speaks: one model seen from outside, one block of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from octavo.numerics.observers import Observer
from octavo.numerics.snapshot import Snapshot
from octavo.spec.facts import ModelFacts
from octavo.spec.plan import Plan


class Block(Protocol):
    """A part of a model with weights, as algorithms see it."""

    name: str

    def layers(self) -> Sequence[str]:
        """Site names of the layers inside, in the order of the forward pass."""
        ...

    def read_weight(self, layer: str) -> Tensor:
        """``(..., out_features, in_features)`` view of a layer's weight."""
        ...

    def write_weight(self, layer: str, value: Tensor) -> None:
        """Replace a layer's weight; shape and dtype stay."""
        ...

    def observers(self) -> Mapping[str, Observer]:
        """Quantizer name -> what it has collected (static activation quantizers only)."""
        ...

    def groups(self) -> Sequence[Sequence[str]]:
        """Layers that read the same tensor."""
        ...

    def run(self, inputs: Any) -> Any:
        """The block's forward."""
        ...


class Door(Protocol):
    """A model, whatever it is made of."""

    def facts(self) -> ModelFacts:
        """Sites, parameters, multiply-adds. Nothing in the model changes."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Put the plan's quantizers in place. Weight quantizers are ready; activation quantizers are off."""
        ...

    def observe(self) -> AbstractContextManager[None]:
        """While open, forward passes are unquantized and feed the observers."""
        ...

    def finish_calibration(self) -> Mapping[str, str]:
        """Turn observed statistics into scales.

        Returns:
            Quantizer name -> why it stays off, for those that saw no data.
        """
        ...

    def run(self, batch: Any) -> Any:
        """One forward pass without gradients: a tensor, a tuple of positional inputs, or a dict."""
        ...

    def quantizer_names(self) -> Sequence[str]:
        """Every quantizer that is in place, in model order."""
        ...

    def disabled(self, names: Callable[[str], bool]) -> AbstractContextManager[None]:
        """While open, the quantizers whose name satisfies ``names`` pass values through."""
        ...

    def blocks(self) -> Iterator[Block]:
        """Parts in the order of the forward pass."""
        ...

    def snapshot(self) -> Snapshot:
        """What exporters see."""
        ...

    def strip(self) -> None:
        """The model as it was."""
        ...
