"""What tasks say of models and runs, and what each quantizer alone costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from octavo.backends.environment import environment, peak_memory_bytes
from octavo.errors import UserError
from octavo.evaluate import LOWER_IS_BETTER, Measure, Outputs, Task, difference
from octavo.evaluate.fidelity import Fidelity
from octavo.pipeline.runs import Metrics, Model, Run, as_loaded
from octavo.report.clock import Clock
from octavo.report.progress import Track, silent
from octavo.search.sensitivity import Sensitivity, rank_quantizers
from octavo.sources import LoadedModel
from octavo.spec.plan import Plan
from octavo.spec.records import MetricRecord, RunRecord, SensitivityRecord
from octavo.spec.version import VERSION


def evaluate(model: Model | Run, tasks: Iterable[Task], *, track: Track = silent) -> dict[str, dict[str, Measure]]:
    """Measure a model, quantized or not, at every task.

    Raises:
        UserError: the model cannot do a task, or a task compares with outputs of an unquantized model.
    """
    loaded = model.loaded if isinstance(model, Run) else as_loaded(model)
    tasks = list(tasks)
    for task in tasks:
        task.check(loaded)
    return measured(loaded, tasks, {}, track, "evaluate")


def sensitivity(
    run: Run,
    task: Task,
    *,
    metric: str = "",
    only: Callable[[str], bool] = lambda name: True,
    track: Track = silent,
) -> tuple[list[Sensitivity], str]:
    """Every quantizer of ``run`` by what it alone costs, the worst first, and the metric that judged.

    The run's record gets the rows, and the time under ``evaluate``.

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
    clock = Clock(run.record.seconds)
    with clock.phase("evaluate"):
        with run.door.disabled(lambda name: True):
            reference = task.outputs(run.loaded)
            known = list(task.evaluate(run.loaded, reference))
        if metric and metric not in known:
            raise UserError(f"task '{task.name}' has no metric '{metric}'; it has {', '.join(known)}")
        chosen = metric or ("kl" if "kl" in known else "cosine" if "cosine" in known else known[0])
        ranked = rank_quantizers(
            run.door,
            lambda: task.evaluate(run.loaded, reference)[chosen].value,
            higher_is_better=chosen not in LOWER_IS_BETTER,
            only=only,
            track=track,
        )
    rows = _sensitivity_records(run.plan, ranked, chosen)
    run.record = dataclasses.replace(run.record, sensitivity=rows, seconds=dict(clock.seconds))
    return ranked, chosen


def shortened(task: Task, count: int) -> Task:
    """A fidelity task on the first ``count`` samples of its data; enough to compare quantizers with each other."""
    if not isinstance(task, Fidelity) or len(task.data) <= count:
        return task
    return dataclasses.replace(task, data=dataclasses.replace(task.data, samples=task.data.samples[:count]))


def plan_record(the_plan: Plan, loaded: LoadedModel, leave: Sequence[str], clock: Clock) -> RunRecord:
    """The record of a plan that was only looked at."""
    return dataclasses.replace(
        RunRecord.of_plan(the_plan, version=VERSION, leave=leave),
        environment=environment(loaded.device),
        seconds=dict(clock.seconds),
        peak_memory_bytes=peak_memory_bytes(),
    )


def evaluation_record(subject: Run | LoadedModel, measures: Metrics, clock: Clock) -> RunRecord:
    """The record of an evaluation: a model's measures are ``baseline``, a run's ``quantized``."""
    is_run = isinstance(subject, Run)
    loaded = subject.loaded if isinstance(subject, Run) else subject
    base = subject.record if isinstance(subject, Run) else RunRecord(model=loaded.source, version=VERSION)
    metrics = {
        task: {
            name: MetricRecord(
                baseline=None if is_run else measure.value,
                quantized=measure.value if is_run else None,
                standard_error=measure.standard_error,
            )
            for name, measure in of_task.items()
        }
        for task, of_task in measures.items()
    }
    return dataclasses.replace(
        base,
        environment=environment(loaded.device),
        metrics=metrics,
        seconds=dict(clock.seconds),
        peak_memory_bytes=peak_memory_bytes(),
        sensitivity=(),
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


def _sensitivity_records(the_plan: Plan, ranked: Sequence[Sensitivity], metric: str) -> tuple[SensitivityRecord, ...]:
    """Rows for a record: quantizer, metric, cost and format."""
    formats = {name: str(spec) for name, spec in the_plan.quantizers()}
    return tuple(
        SensitivityRecord(quantizer=row.quantizer, metric=metric, cost=row.cost, format=formats.get(row.quantizer, ""))
        for row in ranked
    )


def measured(
    loaded: LoadedModel, tasks: Sequence[Task], references: Mapping[str, Outputs | None], track: Track, label: str
) -> dict[str, dict[str, Measure]]:
    """Every metric of every task."""
    return {task.name: task.evaluate(loaded, references.get(task.name)) for task in track(tasks, f"evaluate {label}")}
