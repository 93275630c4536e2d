"""From what the command line says to a quantized, evaluated and written model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octavo import pipeline
from octavo.evaluate import Options, parse_tasks
from octavo.export.run import check_run_target, write_record
from octavo.report.clock import Clock
from octavo.report.progress import Track
from octavo.sources import Batches, LoadedModel, batches, open_data, open_model
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for; ``None`` leaves a number to the recipe or the model."""

    model: str
    recipe: Recipe
    leave: tuple[str, ...] = ()
    data: str | None = None
    tasks: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    out: Path | None = None
    samples: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    stride: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


def quantized(order: Order, track: Track, *, on_plan: Callable[[Plan], None] = lambda plan: None) -> pipeline.Run:
    """Do all of ``order``; what can be refused is refused before any work.

    Raises:
        UserError: as ``pipeline.quantize``, ``pipeline.save`` and ``pipeline.export``.
    """
    clock = Clock()
    if order.out is not None:
        check_run_target(order.out)
    tasks = parse_tasks(order.tasks, task_options(order))
    with clock.phase("load"):
        loaded = opened(order)
        data = calibration(order, loaded)
    run = pipeline.quantize(
        loaded,
        order.recipe,
        data,
        tasks=tasks.values(),
        layouts=order.layouts,
        clock=clock,
        track=track,
        on_plan=on_plan,
    )
    with clock.phase("export"):
        if order.out is not None:
            run = pipeline.save(run, order.out, trust_remote_code=order.trust_remote_code)
            for layout in order.layouts:
                pipeline.export(run, order.out / layout, layout=layout, trust_remote_code=order.trust_remote_code)
    run.record = dataclasses.replace(run.record, leave=order.leave, seconds=dict(clock.seconds))
    if order.out is not None:
        write_record(order.out, run.record)
    return run


def opened(order: Order) -> LoadedModel:
    """The model."""
    return open_model(order.model, device=order.device, dtype=order.dtype, trust_remote_code=order.trust_remote_code)


def calibration(order: Order, loaded: LoadedModel) -> Batches | None:
    """Calibration batches, if there is data."""
    if order.data is None:
        return None
    defaults, data = order.recipe.calibration, open_data(order.data)
    enough = len(data) > defaults.samples
    return batches(
        data,
        loaded,
        batch_size=order.batch_size or defaults.batch_size,
        num_samples=order.samples or (defaults.samples if enough else None),
        max_length=order.max_length,
        seed=order.seed,
    )


def task_options(order: Order) -> Options:
    """How tasks run the model."""
    return Options(batch_size=order.batch_size or 32, max_length=order.max_length, stride=order.stride)
