"""The story of a run: plan, quantize, evaluate, look closer, write, read back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from octavo.backends.environment import environment, peak_memory_bytes
from octavo.calibrate.batches import calibrate, needs_data
from octavo.errors import UserError
from octavo.evaluate import LOWER_IS_BETTER, Measure, Outputs, Task, difference
from octavo.export.base import exporter
from octavo.nn.door import TorchDoor
from octavo.report.clock import Clock
from octavo.report.progress import Track, silent
from octavo.search.sensitivity import Sensitivity, rank_quantizers
from octavo.sources import LoadedModel, as_batches, describe_module
from octavo.sources.example import example_inputs
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.records import MetricRecord, RunRecord, SensitivityRecord
from octavo.spec.resolve import resolve
from octavo.spec.version import VERSION

logger = logging.getLogger(__name__)

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
    """

    loaded: LoadedModel
    recipe: Recipe
    plan: Plan
    record: RunRecord
    door: TorchDoor = field(repr=False)

    @property
    def model(self) -> nn.Module:
        """The quantized model."""
        return self.loaded.model


def plan(model: Model, recipe: str | Path | Recipe, *, sample: Any = None, target: str = "") -> Plan:
    """Who would get what, and why; nothing changes and no data is needed.

    Args:
        model: A module, or what ``octavo.open_model`` gave.
        recipe: A preset's name, a file, or a ``Recipe``.
        sample: One batch for the traced forward. Without it one is made from the model's processor or configuration
            where there is one; without any, the plan says what it could not see.
        target: Where the files will run.

    Raises:
        UserError: the recipe does not fit the model.
    """
    loaded = _loaded(model)
    return resolve(load_recipe(recipe), _door(loaded, sample).facts(), target)


def quantize(
    model: Model,
    recipe: str | Path | Recipe,
    data: Any = None,
    *,
    tasks: Iterable[Task] = (),
    sample: Any = None,
    layouts: Iterable[str] = (),
    target: str = "",
    clock: Clock | None = None,
    track: Track = silent,
) -> Run:
    """Quantize a model in place, in simulated precision.

    Args:
        model: A module, or what ``octavo.open_model`` gave.
        recipe: A preset's name, a file, or a ``Recipe``.
        data: Any iterable of batches (tensor, tuple, dict), or a callable that runs forward passes of the model it is
            given. Not needed by recipes whose ranges are dynamic or of weights only.
        tasks: Measured before and after.
        sample: One batch for the traced forward; the first of ``data`` unless given.
        layouts: Checkpoint layouts to be written later; what they cannot hold is refused now.
        target: Where the files will run.
        clock: Counts the phases; a new one unless given.
        track: Told of progress.

    Raises:
        UserError: the recipe does not fit the model, the data or a layout; the model is then as it was.
    """
    clock = clock or Clock()
    loaded = _loaded(model)
    the_recipe = load_recipe(recipe)
    tasks = list(tasks)
    batches = None if data is None else as_batches(data, num_passes=2)
    with clock.phase("plan"):
        door = _door(loaded, _first(batches) if sample is None and batches is not None else sample)
        the_plan = resolve(the_recipe, door.facts(), target)
        _refuse_early(the_plan, batches, layouts, tasks, loaded)
    with clock.phase("evaluate"):
        references = {task.name: task.outputs(loaded) for task in tasks}
        before = _measure(loaded, tasks, references, track, "unquantized")
    with clock.phase("calibrate"):
        door.prepare(the_plan)
        try:
            calibrated = calibrate(door, the_plan, batches, track=track)
        except BaseException:
            door.strip()
            raise
    with clock.phase("evaluate"):
        after = _measure(loaded, tasks, references, track, the_recipe.name)
    record = dataclasses.replace(
        RunRecord.of_plan(the_plan, version=VERSION),
        environment=environment(loaded.device),
        metrics=compared(before, after),
        seconds=dict(clock.seconds),
        peak_memory_bytes=peak_memory_bytes(),
    )
    left = tuple(f"quantizer '{name}' stays off: {why}" for name, why in calibrated.off.items())
    record = dataclasses.replace(record, warnings=(*record.warnings, *left))
    return Run(loaded, the_recipe, the_plan, record, door)


def evaluate(model: Model | Run, tasks: Iterable[Task], *, track: Track = silent) -> dict[str, dict[str, Measure]]:
    """Measure a model, quantized or not, at every task.

    Raises:
        UserError: the model cannot do a task, or a task compares with outputs of an unquantized model.
    """
    loaded = model.loaded if isinstance(model, Run) else _loaded(model)
    tasks = list(tasks)
    for task in tasks:
        task.check(loaded)
    return _measure(loaded, tasks, {}, track, "evaluate")


def sensitivity(
    run: Run,
    task: Task,
    *,
    metric: str = "",
    only: Callable[[str], bool] = lambda name: True,
    track: Track = silent,
) -> list[Sensitivity]:
    """Every quantizer of ``run`` by what it alone costs, the worst first.

    Args:
        run: A quantized model.
        task: What to judge by; fidelity needs no labels.
        metric: One of the task's metrics; unless given, ``sqnr_db`` of fidelity and else the task's first.
        only: Quantizer names to look at.
        track: Told of every quantizer.

    Raises:
        UserError: the task has no such metric.
    """
    task.check(run.loaded)
    with run.door.disabled(lambda name: True):
        reference = task.outputs(run.loaded)
        known = list(task.evaluate(run.loaded, reference))
    if metric and metric not in known:
        raise UserError(f"task '{task.name}' has no metric '{metric}'; it has {', '.join(known)}")
    chosen = metric or ("kl" if "kl" in known else "cosine" if "cosine" in known else known[0])
    return rank_quantizers(
        run.door,
        lambda: task.evaluate(run.loaded, reference)[chosen].value,
        higher_is_better=chosen not in LOWER_IS_BETTER,
        only=only,
        track=track,
    )


def compared(before: Metrics, after: Metrics) -> dict[str, dict[str, MetricRecord]]:
    """Task -> metric -> both values, and the paired standard error of their difference."""
    return {
        task: {
            name: MetricRecord(
                baseline=before[task][name].value if name in before.get(task, {}) else None,
                quantized=measure.value,
                standard_error=(
                    difference(measure, before[task][name]).standard_error
                    if name in before.get(task, {})
                    else measure.standard_error
                ),
            )
            for name, measure in measures.items()
        }
        for task, measures in after.items()
    }


def _loaded(model: Model) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else describe_module(model)


def _door(loaded: LoadedModel, sample: Any) -> TorchDoor:
    return TorchDoor(loaded.model, loaded.source, example_inputs(loaded) if sample is None else sample)


def _first(batches: Iterable[Any]) -> Any:
    first = next(iter(batches), None)
    if first is None:
        raise UserError("the calibration data is empty: it gave no batch")
    return first


def _refuse_early(
    the_plan: Plan, batches: Iterable[Any] | None, layouts: Iterable[str], tasks: Sequence[Task], loaded: LoadedModel
) -> None:
    """Everything that can be known to fail, before any work."""
    waiting = needs_data(the_plan)
    if waiting and batches is None:
        raise UserError(
            f"recipe '{the_plan.recipe}' has {len(waiting)} static activation quantizers (such as '{waiting[0]}'), whose "
            "ranges only data can tell: give calibration data, or choose a dynamic or weight-only recipe"
        )
    for layout in layouts:
        problems = exporter(layout).problems(the_plan)
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems[:5])
            more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise UserError(f"layout '{layout}' cannot hold this plan:{shown}{more}")
    for task in tasks:
        task.check(loaded)


def _measure(
    loaded: LoadedModel, tasks: Sequence[Task], references: Mapping[str, Outputs | None], track: Track, label: str
) -> dict[str, dict[str, Measure]]:
    return {task.name: task.evaluate(loaded, references.get(task.name)) for task in track(tasks, f"evaluate {label}")}
