"""What a task is."""

from __future__ import annotations

from typing import Protocol

from octavo.evaluate.metrics import Measure
from octavo.evaluate.outputs import Outputs
from octavo.sources import LoadedModel


class Task(Protocol):
    """Something a model is measured at.

    Before quantization: ``reference = task.outputs(loaded)``. After it: ``task.evaluate(loaded, reference)``.
    """

    @property
    def name(self) -> str:
        """The key of its measures in a record."""

    @property
    def kind(self) -> str:
        """Which measures it has."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``UserError`` when ``loaded`` cannot do this task; costs nothing."""

    def outputs(self, loaded: LoadedModel) -> Outputs | None:
        """What the unquantized model says, for a task that compares with it; None for all others."""

    def evaluate(self, loaded: LoadedModel, reference: Outputs | None = None) -> dict[str, Measure]:
        """The measures by name. ``reference`` is what ``outputs`` gave before quantization."""
