"""From what the command line says to a quantized, evaluated and written model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo import pipeline
from octavo.errors import UserError
from octavo.evaluate import Options, Task, parse_tasks
from octavo.export.base import exporter
from octavo.export.run import check_run_target, write_record
from octavo.report.clock import Clock
from octavo.report.progress import Track
from octavo.report.words import shape_text
from octavo.sources import Batches, DataKind, Dataset, LoadedModel, batches, feed, open_data, open_model
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe
from octavo.spec.select import parse_pattern, quantizer_name
from octavo.spec.suggest import no_match_message


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
    require_coverage: float | None = None
    samples: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    stride: int | None = None
    seed: int = 0
    target: str = ""
    processor: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


def quantized(
    order: Order, track: Track, *, on_plan: Callable[[Plan], None] = lambda plan: None, judge: Task | None = None
) -> pipeline.Run:
    """Do all of ``order``; what can be refused is refused before any work.

    Args:
        order: What to do.
        track: Told of progress.
        on_plan: Told of the plan before any work.
        judge: A task for later, which the model must be able to do.

    Raises:
        UserError: as ``pipeline.quantize``, ``pipeline.save`` and ``pipeline.export``.
    """
    clock = Clock()
    _check_outputs(order)
    tasks = parse_tasks(order.tasks, task_options(order))
    with clock.phase("load"):
        loaded = opened(order)
        data = calibration(order, loaded)
    if judge is not None:
        judge.check(loaded)
    run = pipeline.quantize(
        loaded,
        order.recipe,
        data,
        tasks=tasks.values(),
        layouts=("onnx",) if is_graph_file(order.out) else order.layouts,
        target=order.target,
        require_coverage=order.require_coverage,
        checkpoint=None if order.out is None else checkpoint_of(order.out),
        clock=clock,
        track=track,
        on_plan=on_plan,
    )
    with clock.phase("export"):
        if order.out is not None:
            run = _written(run, order, order.out, sample=None if data is None else next(iter(data)))
    run.record = dataclasses.replace(run.record, leave=order.leave, seconds=dict(clock.seconds))
    if order.out is not None and not is_graph_file(order.out):
        write_record(order.out, run.record)
    pipeline.forget_checkpoint(run)
    return run


def checkpoint_of(out: Path) -> Path:
    """Where blocks that steps have finished wait while ``out`` is not written."""
    out = out.expanduser().resolve()
    return out.with_name(f".octavo-blocks-{out.name}")


def _written(run: pipeline.Run, order: Order, out: Path, *, sample: Any) -> pipeline.Run:
    """One graph, or a run directory with the checkpoints that were asked for."""
    if is_graph_file(out):
        return pipeline.export_graph(run, out, sample=sample)
    run = pipeline.save(run, out, trust_remote_code=order.trust_remote_code, keep_checkpoint=True)
    for layout in order.layouts:
        code = order.trust_remote_code
        pipeline.export(run, out / layout, layout=layout, sample=sample, trust_remote_code=code)
    return run


def is_graph_file(out: Path | None) -> bool:
    """Whether ``--out`` names a graph and not a run directory."""
    return out is not None and out.suffix == ".onnx"


class Wanted:
    """The quantizers that a pattern means, known as soon as there is a plan.

    Raises:
        UserError: not a pattern.
    """

    def __init__(self, text: str) -> None:
        self.pattern = parse_pattern(text)
        self.names: set[str] = set()

    def look(self, plan: Plan) -> None:
        """Find them.

        Raises:
            UserError: the pattern means no quantizer of ``plan``.
        """
        self.names = {
            quantizer_name(decision.site.name, slot)
            for decision in plan.decisions
            for slot in self.pattern.matching_slots(decision.site)
            if slot in decision.scheme
        }
        if self.names:
            return
        sites = [decision.site for decision in plan.decisions]
        if any(map(self.pattern.matches, sites)):
            raise UserError(f"pattern '{self.pattern.text}' (--only): recipe '{plan.recipe}' quantizes nothing there")
        raise UserError(no_match_message(self.pattern, sites, "--only"))


def opened(order: Order) -> LoadedModel:
    """The model."""
    return open_model(
        order.model,
        device=order.device,
        dtype=order.dtype,
        trust_remote_code=order.trust_remote_code,
        processor=order.processor,
    )


def calibration(order: Order, loaded: LoadedModel) -> Batches | None:
    """Calibration batches, if there is data."""
    if order.data is None:
        return None
    defaults = order.recipe.calibration
    return drawn(
        open_data(order.data),
        loaded,
        batch_size=order.batch_size or defaults.batch_size,
        samples=order.samples,
        otherwise=defaults.samples,
        max_length=order.max_length,
        seed=order.seed,
    )


def drawn(
    data: Dataset,
    loaded: LoadedModel,
    *,
    batch_size: int,
    samples: int | None,
    otherwise: int,
    max_length: int | None = None,
    seed: int = 0,
) -> Batches:
    """Batches of so many ``samples``; unless asked for, ``otherwise`` or all there are.

    Raises:
        UserError: the data does not fit the model.
    """
    enough = len(data) > otherwise
    made = batches(
        data,
        loaded,
        batch_size=batch_size,
        num_samples=samples or (otherwise if enough else None),
        max_length=max_length,
        seed=seed,
    )
    if data.kind in (DataKind.BATCHES, DataKind.ARRAYS):
        check_batch(loaded, next(iter(made)), data.name)
    return made


def sample(order: Order, loaded: LoadedModel) -> Any:
    """One batch for the traced forward; ``None`` without data."""
    first = dataclasses.replace(order, samples=1, batch_size=1)
    made = calibration(first, loaded)
    return None if made is None else next(iter(made))


def with_batch(path: Path, data: str, *, trust_remote_code: bool) -> tuple[pipeline.Run, Any]:
    """A run that was loaded again, and a batch of ``data`` that fits it."""
    run = pipeline.load(path, trust_remote_code=trust_remote_code)
    made = drawn(open_data(data), run.loaded, batch_size=2, samples=None, otherwise=2)
    return run, next(iter(made))


@torch.no_grad()
def check_batch(loaded: LoadedModel, batch: Any, name: str) -> None:
    """Raise ``UserError`` unless the model runs on a batch that the user made."""
    try:
        feed(loaded.model, batch)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data '{name}' does not fit model '{loaded.source}': its forward pass, given {_described(batch)}, says: "
            f"{reason}. A batch is a tensor, a tuple of arguments or a dict of them"
        ) from error


def _described(value: Any) -> str:
    """A batch in a few words: its shapes."""
    match value:
        case torch.Tensor():
            return f"tensor {shape_text(tuple(value.shape))}"
        case dict():
            return "{" + ", ".join(f"{key}: {_described(entry)}" for key, entry in value.items()) + "}"
        case tuple() | list():
            return "(" + ", ".join(map(_described, value)) + ")"
    return type(value).__name__


def _check_outputs(order: Order) -> None:
    """Raise ``UserError`` now for what could not be written later."""
    for layout in order.layouts:
        exporter(layout, pipeline.LAYOUTS)
    if order.layouts and order.out is None:
        raise UserError(f"--layout {order.layouts[0]} is written into the run directory: say which, --out RUN")
    if order.out is not None and is_graph_file(order.out):
        if order.layouts:
            raise UserError(f"--out {order.out} is one graph: layouts need a run directory, such as --out RUN")
        pipeline.check_graph_target(order.out)
    elif order.out is not None:
        check_run_target(order.out)


def task_options(order: Order) -> Options:
    """How tasks run the model."""
    return Options(batch_size=order.batch_size or 32, max_length=order.max_length, stride=order.stride)
