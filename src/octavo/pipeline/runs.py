"""What a run is, and who opens and writes which kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from octavo.errors import UserError
from octavo.evaluate import Measure
from octavo.export.base import EXPORTERS, AnyExporter, ModelExporter
from octavo.nn.door import TorchDoor
from octavo.numerics.door import Door
from octavo.onnx.layout import OnnxLayout, open_graph_door
from octavo.sources import LoadedModel, describe_module
from octavo.sources.example import example_inputs
from octavo.sources.graphs import GraphModule
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe
from octavo.spec.records import RunRecord

MODEL_EXPORTERS: dict[str, ModelExporter] = {layout.name: layout for layout in (OnnxLayout(),)}
DOORS: dict[type[nn.Module], Callable[[Any, str, Any], Door]] = {GraphModule: open_graph_door, nn.Module: TorchDoor}
"""What opens which kind of module; the first that fits."""
LAYOUTS: dict[str, AnyExporter] = {**EXPORTERS, **MODEL_EXPORTERS}
Model = nn.Module | LoadedModel
Metrics = Mapping[str, Mapping[str, Measure]]


@dataclass
class Run:
    """A quantized model with everything that is known of how it came about.

    Args:
        loaded: The model, in simulated precision, with its processor.
        recipe: What was asked for.
        plan: What that meant for this model.
        record: What happened.
        door: The model as procedures see it.
        baseline: What the tasks said of the unquantized model; another run of the model need not ask again.
        checkpoint: Where the blocks that steps have finished wait until the run is saved; ``None`` for nowhere.
    """

    loaded: LoadedModel
    recipe: Recipe
    plan: Plan
    record: RunRecord
    door: Door = field(repr=False)
    baseline: Metrics = field(default_factory=dict, repr=False)
    checkpoint: Path | None = None

    @property
    def model(self) -> nn.Module:
        """The quantized model."""
        return self.loaded.model


def as_loaded(model: Model) -> LoadedModel:
    """``model`` with what is known of it."""
    return model if isinstance(model, LoadedModel) else describe_module(model)


def door_on_sample(loaded: LoadedModel, sample: Any) -> Door:
    """What opens ``loaded``, with one batch to look at it."""
    open_door = next(door for kind, door in DOORS.items() if isinstance(loaded.model, kind))
    return open_door(loaded.model, loaded.source, example_inputs(loaded) if sample is None else sample)


def first_batch(batches: Iterable[Any]) -> Any:
    """The first of ``batches``.

    Raises:
        UserError: there is none.
    """
    first = next(iter(batches), None)
    if first is None:
        raise UserError("the calibration data is empty: it gave no batch")
    return first
