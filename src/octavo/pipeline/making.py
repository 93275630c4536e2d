"""From a model and a recipe to a plan, and to a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from octavo.algorithms.base import make_algorithms
from octavo.backends.environment import code_digest, environment, peak_memory_bytes
from octavo.calibrate.batches import Calibrated, calibrate
from octavo.calibrate.blockwise import calibrate_blockwise
from octavo.calibrate.checkpoint import Keeping, check_checkpoint
from octavo.errors import UserError
from octavo.evaluate import Task
from octavo.export.base import exporter
from octavo.nn.originals import kept_bytes, watched
from octavo.numerics.digest import digest_of
from octavo.numerics.door import Door
from octavo.numerics.statistics import Need
from octavo.pipeline.judging import compared, measured
from octavo.pipeline.refusals import refuse_early, refuse_misfits, refuse_step_misfits, refuse_steps
from octavo.pipeline.runs import LAYOUTS, Metrics, Model, Run, as_loaded, door_on_sample, first_batch
from octavo.report.clock import Clock
from octavo.report.progress import Track, silent
from octavo.sources import LoadedModel, as_batches
from octavo.sources.feeding import few_rows
from octavo.sources.graphs import GraphModule
from octavo.spec.beside import Beside
from octavo.spec.coverage import check_coverage
from octavo.spec.experts import rare_experts
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.records import ExpertsRecord, RunRecord
from octavo.spec.resolve import resolve
from octavo.spec.step_order import fused_rotation
from octavo.spec.targets import TARGETS
from octavo.spec.version import VERSION

logger = logging.getLogger(__name__)


def plan(
    model: Model, recipe: str | Path | Recipe, *, sample: Any = None, target: str = "", layouts: Iterable[str] = ()
) -> Plan:
    """Who would get what, and why; nothing changes and no data is needed.

    Args:
        model: A module, or what ``octavo.open_model`` gave.
        recipe: A preset's name, a file, or a ``Recipe``.
        sample: One batch for the traced forward. Without it one is made from the model's processor or configuration
            where there is one; without any, the plan says what it could not see.
        target: Where the files will run.
        layouts: Checkpoint layouts to be written later; what they cannot hold is refused now.

    Raises:
        UserError: the recipe does not fit the model, or the plan a layout.
    """
    loaded, the_recipe = as_loaded(model), load_recipe(recipe)
    found = _resolved(door_on_sample(loaded, sample), the_recipe, target, may_untie=False)
    refuse_misfits(found, layouts)
    refuse_step_misfits(found, the_recipe, layouts)
    return found


def quantize(
    model: Model,
    recipe: str | Path | Recipe,
    data: Any = None,
    *,
    tasks: Iterable[Task] = (),
    sample: Any = None,
    layouts: Iterable[str] = (),
    target: str = "",
    baseline: Metrics | None = None,
    require_coverage: float | None = None,
    keep_original: bool = False,
    checkpoint: str | Path | None = None,
    clock: Clock | None = None,
    track: Track = silent,
    on_plan: Callable[[Plan], None] = lambda the_plan: None,
) -> Run:
    """Quantize a model in place, in simulated precision.

    Args:
        model: A module, or what ``octavo.open_model`` gave.
        recipe: A preset's name, a file, or a ``Recipe``.
        data: Any iterable of batches (tensor, tuple, dict), or a callable that runs forward passes of the model it is
            given. Not needed by recipes whose ranges are dynamic or of weights only.
        tasks: Measured before and after.
        sample: One batch for the traced forward; unless given, rows of the first of ``data``: as many as it takes.
        layouts: Checkpoint layouts to be written later; what they cannot hold is refused now.
        target: Where the files will run.
        baseline: What the same tasks said of the unquantized model before (``Run.baseline``).
        require_coverage: Least share of parameters, 0 to 1, that must get a quantized weight.
        keep_original: Keep a copy of the model's tensors where steps change them, so that ``strip`` gives them back.
        checkpoint: A directory, made if need be, where blocks that steps have finished wait until ``save``: the same
            call goes on from there after a crash, and gives the same bytes.
        clock: Counts the phases; a new one unless given.
        track: Told of progress.
        on_plan: Told of the plan before any work.

    Raises:
        UserError: the recipe does not fit the model, the data or a layout; the model is then as it was. An error of a
            step that has changed weights already says so, unless the originals are kept.
    """
    clock = clock or Clock()
    loaded = as_loaded(model)
    the_recipe = load_recipe(recipe)
    tasks, layouts = list(tasks), list(layouts)
    batches = None if data is None else as_batches(data, num_passes=2)
    with clock.phase("plan"):
        door = door_on_sample(loaded, sample) if sample is not None or batches is None else _door_on(loaded, batches)
        the_plan = _resolved(door, the_recipe, target, may_untie=True)
        with _tied_again_on_error(door):
            if require_coverage is not None:
                check_coverage(the_plan, require_coverage)
            refuse_early(the_plan, batches, layouts, tasks, loaded)
            refuse_steps(the_plan, the_recipe, batches, layouts)
            keeping = None
            if checkpoint is not None and the_recipe.steps:
                check_checkpoint(Path(checkpoint))
                keeping = Keeping(Path(checkpoint), _fingerprint(loaded, the_plan, the_recipe, batches, layouts))
        if keep_original and the_recipe.steps:
            cost = f"keep_original keeps a copy of the original tensors in memory: {kept_bytes(loaded.model):,} bytes"
            the_plan = dataclasses.replace(the_plan, warnings=(*the_plan.warnings, cost))
    on_plan(the_plan)
    with clock.phase("evaluate"):
        references = {task.name: task.outputs(loaded) for task in tasks}
        before = measured(loaded, tasks, references, track, "unquantized") if baseline is None else baseline
    with clock.phase("calibrate"):
        door.prepare(the_plan)
        try:
            with watched(loaded.model, tuple(step.name for step in the_recipe.steps), keep=keep_original):
                folds_only = _folds_only(the_plan, layouts)
                calibrated = _calibrate(
                    door, the_plan, the_recipe, batches, track=track, keeping=keeping, folds_only=folds_only
                )
        except BaseException as error:
            _take_back(door, error)
            raise
    the_plan = the_plan.with_beside(_left_beside(door, the_plan))
    with clock.phase("evaluate"):
        after = measured(loaded, tasks, references, track, the_recipe.name)
    record = dataclasses.replace(
        RunRecord.of_plan(the_plan, version=VERSION),
        environment=environment(loaded.device),
        metrics=compared(before, after),
        seconds=dict(clock.seconds),
        peak_memory_bytes=peak_memory_bytes(),
    )
    left = tuple(f"quantizer '{name}' stays off: {why}" for name, why in calibrated.off.items())
    record = dataclasses.replace(
        record,
        warnings=(*record.warnings, *left, *calibrated.notes, *rare_experts(the_plan, calibrated.expert_tokens)),
        experts=_experts_records(the_plan, calibrated.expert_tokens),
        blocks=calibrated.blocks,
    )
    return Run(loaded, the_recipe, the_plan, record, door, before, None if keeping is None else keeping.directory)


def _door_on(loaded: LoadedModel, batches: Iterable[Any]) -> Door:
    """Looks at the model with a few rows of the first batch, or all of them where few might not show everything."""
    batch = first_batch(batches)
    few = few_rows(batch)
    if few is not None:
        door = door_on_sample(loaded, few)
        with suppress(Exception):  # a model that wants its rows all together says so again, or not
            facts = door.facts()
            if not facts.experts and not any(site.unreached for site in facts.sites):
                return door
    return door_on_sample(loaded, batch)


def _resolved(door: Door, recipe: Recipe, target: str, *, may_untie: bool) -> Plan:
    """The plan, with what becomes of rotations that are to be fused into weights."""
    for step, algorithm in make_algorithms(recipe.steps):
        if why := door.why_not(algorithm.needs):
            raise UserError(f"step '{step.name}': {why}")
    rotation = fused_rotation(recipe.steps)
    if rotation is None:
        return resolve(recipe, door.facts(), target)
    found = door.find_rotations(rotation.fused, may_untie=may_untie)
    with _tied_again_on_error(door):
        the_plan = resolve(recipe, door.facts(), target)
    return dataclasses.replace(the_plan, warnings=(*the_plan.warnings, *found.notes), untied=found.untied)


@contextmanager
def _tied_again_on_error(door: Door) -> Iterator[None]:
    try:
        yield
    except BaseException:
        door.tie_again()
        raise


def _take_back(door: Door, error: BaseException) -> None:
    try:
        door.strip()
    except UserError as refusal:
        error.add_note(str(refusal))


def _left_beside(door: Door, the_plan: Plan) -> dict[str, Beside]:
    """Site -> what algorithms have left beside it."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in door.simulated_extras():
        site, _, part = name.removesuffix(".a").rpartition(".")
        match part:
            case "pre_scale":
                found.setdefault(site, {})["num_scales"] = tensor.numel()
            case "low_rank":
                found.setdefault(site, {})["rank"] = tensor.shape[-2]
            case "input_rotation":
                found.setdefault(site, {})["rotation"] = int(tensor)
    known = {name for decision in the_plan.decisions for name in decision.site.parameters}
    layers = {f"{d.site.name}.bias": d.site.name for d in the_plan.decisions if d.weight is not None}
    for key, tensor in door.snapshot().passthrough():
        if key in layers and key not in known:
            found.setdefault(layers[key], {})["num_biases"] = tensor.numel()
    return {site: Beside(**values) for site, values in found.items()}


def _fingerprint(
    loaded: LoadedModel, the_plan: Plan, recipe: Recipe, batches: Iterable[Any] | None, layouts: Sequence[str]
) -> dict[str, str]:
    """Of what finished blocks are, without the data."""
    if isinstance(batches, list) and any(callable(batch) for batch in batches):
        raise UserError("checkpoint: what a function feeds is not known beforehand; give batches, or no checkpoint")
    directory = loaded.directory
    settings = [] if directory is None else [path.read_bytes() for path in sorted(directory.glob("*config*.json"))]
    files = [loaded.model.path.read_bytes()] if isinstance(loaded.model, GraphModule) else []
    return {
        "model": digest_of(loaded.model.state_dict(), str(loaded.device), settings, files),
        "recipe": digest_of(
            recipe.to_yaml(),
            dataclasses.replace(the_plan, warnings=()).to_json(),
            sorted(_folds_only(the_plan, layouts)),
        ),
        "code": code_digest(),
    }


def _folds_only(the_plan: Plan, layouts: Iterable[str]) -> frozenset[str]:
    """Layers whose input takes a scale only where it can be folded into what makes it.

    A runtime that computes convolutions in integers would leave integers for the scale in front of one.
    """
    of_layouts = frozenset().union(*(exporter(layout, LAYOUTS).folds_only(the_plan) for layout in layouts))
    if the_plan.target not in TARGETS:
        return of_layouts
    return of_layouts | {d.site.name for d in the_plan.decisions if d.site.operation in ("conv", "conv_transposed")}


def _calibrate(
    door: Door,
    the_plan: Plan,
    recipe: Recipe,
    batches: Iterable[Any] | None,
    *,
    track: Track,
    keeping: Keeping | None = None,
    folds_only: frozenset[str] = frozenset(),
) -> Calibrated:
    """One pass over the data; block by block where the recipe has steps."""
    steps = make_algorithms(recipe.steps)
    if not steps:
        return calibrate(door, the_plan, batches, track=track)
    wanted = recipe.calibration.inputs
    makes_up = any(Need.QUANTIZED in algorithm.needs for _, algorithm in steps)
    is_quantized = wanted == "quantized" or (wanted == "auto" and makes_up)
    return calibrate_blockwise(
        door, the_plan, steps, batches, is_quantized=is_quantized, track=track, keeping=keeping, folds_only=folds_only
    )


def _experts_records(the_plan: Plan, tokens: Mapping[str, Sequence[int]]) -> tuple[ExpertsRecord, ...]:
    policy = the_plan.experts.rare.value if the_plan.experts is not None else ""
    return tuple(ExpertsRecord(name=name, policy=policy, tokens=list(counts)) for name, counts in tokens.items())
