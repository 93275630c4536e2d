"""Who makes each tensor of a traced forward, and who reads it: the model as a graph, one event for each computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.frames import Chain

ADDS = frozenset({torch.add, Tensor.add, Tensor.add_})
"""Sums; ``+`` and ``+=`` are among them."""
ACTIVATIONS = frozenset(
    {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, torch.clamp, Tensor.clamp}
)
"""What becomes a Relu or a Clip in a graph, which engines compute with the layer before it."""
OUTSIDE = "(outside)"
"""Who reads what the model returns."""
SELECTIONS = ACTIVATIONS | {F.max_pool1d, F.max_pool2d, F.max_pool3d}
"""What gives some of the values that it gets, or a bound."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call expression of one module.

    Args:
        owner: Path of the innermost module that was running.
        chain: From a method of that module down to the call.
    """

    owner: str
    chain: Chain


@dataclass(frozen=True, slots=True)
class Event:
    """One layer, or one torch function outside of layers, computed once.

    Args:
        owner: Path of the layer, or of the innermost module that was running.
        func: The torch function; ``None`` for a whole layer, and for what the model returns.
        reads: Numbers of the tensors that went in.
        makes: Numbers of those that came out and had not gone in.
        ndim: Axes of the first of them.
        calls: Expressions that lead to a sum or an activation, the innermost first.
    """

    owner: str
    func: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    ndim: int = 0
    calls: tuple[Call, ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer for which a counterpart stands."""
        return self.func is None and bool(self.makes)


@dataclass(slots=True)
class Uses:
    """All events of a forward, in order.

    Args:
        events: What was noted.
        is_blind: Tensors do not tell when they were changed in place (inference mode).
    """

    events: list[Event] = field(default_factory=list)
    is_blind: bool = False
    _makers: dict[int, Event] = field(default_factory=dict)
    _readers: dict[int, list[Event]] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        """One more event."""
        self.events.append(event)
        self._makers |= dict.fromkeys(event.makes, event)
        for number in dict.fromkeys(event.reads):
            self._readers.setdefault(number, []).append(event)

    def maker(self, number: int) -> Event | None:
        """What gave this tensor; ``None`` for what came in from outside."""
        return self._makers.get(number)

    def readers(self, number: int) -> list[Event]:
        """Who reads this tensor; what the model returns is read, too."""
        return self._readers.get(number, [])

    def of(self, owner: str) -> Iterator[Event]:
        """Events of one module."""
        return (event for event in self.events if event.owner == owner)
