"""One site of a torch model: its facts, and where in the module tree they live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from octavo.nn.layers import original_class
from octavo.nn.redirects import TappedCall
from octavo.nn.views import WeightView
from octavo.spec.facts import QUANTIZER_NAMES, SiteFacts, Slot


@dataclass(frozen=True, slots=True)
class Site:
    """Facts, and where in the module tree they live.

    Args:
        facts: What the plan sees.
        module: Path of the module that computes here.
        weight: State-dict key of the weight, empty for none.
        view: The weight as a matrix.
        calls: Path of a module -> calls in its methods that pass quantizers.
        places: Slot -> module and name of its quantizer as a child, where these are not ``module`` and the usual name.
        is_read: The weight is rounded wherever it is read, not by a counterpart of the module.
        input_place: Of a weight that a function computes with: path of the module that holds what is done to its input,
            the child's name there, and the axis of the input's channels from the end; ``None`` where it has no place.
        reads: Number of the tensor that is read here; equal numbers, equal tensors; -1 for unknown.
        is_layer: The module computes in its counterpart, and ``calls`` are where its output is rounded.
        through: Path of a norm that is on the way there, and must be folded for it.
    """

    facts: SiteFacts
    module: str
    weight: str = ""
    view: WeightView | None = None
    calls: Mapping[str, tuple[TappedCall, ...]] = field(default_factory=dict)
    places: Mapping[Slot, tuple[str, str]] = field(default_factory=dict)
    is_read: bool = False
    reads: int = -1
    input_place: tuple[str, str, int] | None = None
    is_layer: bool = False
    through: str = ""

    def place(self, slot: Slot) -> tuple[str, str]:
        """Path of the module that holds the quantizer of ``slot``, and its name there."""
        return self.places.get(slot, (self.module, QUANTIZER_NAMES[slot]))

    def without_outlet(self) -> Site:
        """The site of a layer, with its output rounded where the layer gives it."""
        places = {slot: place for slot, place in self.places.items() if slot is not Slot.OUTPUT}
        return replace(self, facts=replace(self.facts, activation=""), calls={}, places=places, through="")


def make_facts(
    name: str, operation: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], **more: Any
) -> SiteFacts:
    """Facts of a site in ``module``, to which ``parameters`` belong."""
    own = original_class(module)
    bases = tuple(base.__name__ for base in own.__mro__[1:] if issubclass(base, nn.Module) and base is not nn.Module)
    return SiteFacts(
        name=name,
        operation=operation,
        type_name=own.__name__,
        base_types=bases,
        parameters={key: p.numel() for key, p in parameters.items()},
        parameter_bytes=sum(p.nbytes for p in parameters.values()),
        **more,
    )


def joined(*parts: str) -> str:
    """Dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)
