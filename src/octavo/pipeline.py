"""The story of a run: plan, quantize, evaluate, look closer, write, read back."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.algorithms.base import make_algorithms
from octavo.backends.environment import code_digest, environment, peak_memory_bytes
from octavo.calibrate.batches import Calibrated, calibrate, require_no_data
from octavo.calibrate.blockwise import calibrate_blockwise, matchers, require_data_for
from octavo.calibrate.checkpoint import Keeping, check_checkpoint, removed
from octavo.errors import UserError
from octavo.evaluate import LOWER_IS_BETTER, Measure, Outputs, Task, difference
from octavo.evaluate.fidelity import Fidelity
from octavo.export.base import EXPORTERS, AnyExporter, ModelExporter, exporter, written_from_model
from octavo.export.run import write_run
from octavo.export.run_files import RunFiles, read_run
from octavo.export.views import dequantized_weights
from octavo.nn.door import TorchDoor
from octavo.nn.originals import kept_bytes, watched
from octavo.numerics.arrays import array_of, tensor_of, tensors_in
from octavo.numerics.digest import digest_of
from octavo.numerics.door import Door
from octavo.numerics.snapshot import Agreement, Snapshot
from octavo.numerics.statistics import Need
from octavo.onnx.layout import OnnxLayout, open_graph_door, rename_graph
from octavo.readers.compare import Comparison, Difference, compare_weights
from octavo.readers.opening import open_checkpoint
from octavo.report.clock import Clock
from octavo.report.fold import fold_problems
from octavo.report.progress import Track, silent
from octavo.search.sensitivity import Sensitivity, rank_quantizers
from octavo.sources import LoadedModel, as_batches, describe_module, open_model, open_untrained
from octavo.sources.example import example_inputs
from octavo.sources.extras import is_callable_name
from octavo.sources.feeding import few_rows
from octavo.sources.graphs import GraphModule
from octavo.sources.models import describes_model
from octavo.spec.beside import Beside
from octavo.spec.coverage import check_coverage
from octavo.spec.experts import rare_experts
from octavo.spec.plan import Decision, Plan
from octavo.spec.recipe import Recipe, load_recipe, read_recipe
from octavo.spec.records import ExpertsRecord, MetricRecord, RunRecord, SensitivityRecord
from octavo.spec.resolve import for_target, resolve, with_sums
from octavo.spec.select import quantizer_name
from octavo.spec.steps import fused_rotation
from octavo.spec.targets import Target, target_named
from octavo.spec.version import VERSION

logger = logging.getLogger(__name__)

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
    loaded, the_recipe = _loaded(model), load_recipe(recipe)
    found = _resolved(_door(loaded, sample), the_recipe, target, may_untie=False)
    _refuse_misfits(found, layouts)
    _refuse_step_misfits(found, the_recipe, layouts)
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
    loaded = _loaded(model)
    the_recipe = load_recipe(recipe)
    tasks, layouts = list(tasks), list(layouts)
    batches = None if data is None else as_batches(data, num_passes=2)
    with clock.phase("plan"):
        door = _door(loaded, sample) if sample is not None or batches is None else _door_on(loaded, batches)
        the_plan = _resolved(door, the_recipe, target, may_untie=True)
        with _tied_again_on_error(door):
            if require_coverage is not None:
                check_coverage(the_plan, require_coverage)
            _refuse_early(the_plan, batches, layouts, tasks, loaded)
            _refuse_steps(the_plan, the_recipe, batches, layouts)
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
        before = _measure(loaded, tasks, references, track, "unquantized") if baseline is None else baseline
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
        after = _measure(loaded, tasks, references, track, the_recipe.name)
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


def save(run: Run, path: str | Path, *, trust_remote_code: bool = False, keep_checkpoint: bool = False) -> Run:
    """Write the run directory: packed codes and scales, plan, recipe, record, the model's config and tokenizer.

    The checkpoint that the run was made with is removed, unless ``keep_checkpoint`` says that more is to come.

    Returns:
        ``run``, whose record now knows the path and the bytes written.

    Raises:
        UserError: ``path`` holds something that is not a run, or the disk is too small; what was there stays.
    """
    run.record = write_run(
        run.door.snapshot(),
        run.plan,
        recipe=run.recipe.to_yaml(),
        record=run.record,
        source_directory=run.loaded.directory,
        write_skeleton=run.door.write_skeleton,
        out=Path(path),
        trust_remote_code=trust_remote_code,
    )
    if not keep_checkpoint:
        forget_checkpoint(run)
    return run


def forget_checkpoint(run: Run) -> None:
    """Remove the finished blocks on disk, when the run's files are written."""
    if run.checkpoint is not None:
        removed(run.checkpoint)
        run.checkpoint = None


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    sample: Any = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Run:
    """The run that ``save`` wrote, in simulated precision: its outputs are those of the saved model, bit for bit.

    Args:
        path: A run directory.
        model: A module of the saved model's class, whose weights are replaced; needed when the run has no
            ``config.json`` and was not made from ``package.module:factory``.
        sample: One batch for the traced forward; see ``plan``.
        device: Where the model goes.
        trust_remote_code: Run code that lies beside the weights.

    Raises:
        UserError: not a run, damaged, or of another model.
    """
    path = Path(path)
    files = read_run(path)
    loaded = _skeleton(files, model, device, trust_remote_code)
    loaded.source = files.record.model
    door = _door(loaded, sample)
    door.restore(files.plan, _state_dict(files), files.layers())
    return Run(loaded, read_recipe(files.recipe, str(path / "recipe.yaml")), files.plan, files.record, door)


def export(
    run: Run | str | Path,
    path: str | Path,
    *,
    layout: str = "modelopt",
    target: str = "",
    sample: Any = None,
    dtype: torch.dtype | None = None,
    use_cache: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint ``path`` that inference engines load.

    Args:
        run: A quantized model, or a run directory (a model is built only for a layout that is made from one).
        path: The directory to write; an earlier checkpoint of the same layout is replaced at the end.
        layout: Its layout.
        target: Where the files will run; the run's own unless given.
        sample: One batch for a layout that traces the model; made up where the model's files tell what it takes.
        dtype: What floating tensors that stay unquantized are cast to; ``None``: as they are.
        use_cache: A decoder's graph takes the keys and values of earlier tokens, and gives those of all.
        trust_remote_code: Copy the model's Python files, too.

    Raises:
        UserError: the layout cannot hold the run, the run was made for another target, ``path`` holds something else,
            or the disk is too small.
    """
    exporter(layout, LAYOUTS)
    if layout in MODEL_EXPORTERS:
        return _export_model(
            run,
            MODEL_EXPORTERS[layout],
            out=Path(path),
            target=target,
            sample=sample,
            float_dtype=dtype,
            use_cache=use_cache,
            trust_remote_code=trust_remote_code,
        )
    if not use_cache:
        raise UserError(f"layout '{layout}' has no cache to leave out: only {', '.join(MODEL_EXPORTERS)} writes one")
    if isinstance(run, Run):
        snapshot: Snapshot = run.door.snapshot()
        the_plan, directory = run.plan, run.loaded.directory
    else:
        files = read_run(Path(run))
        snapshot, the_plan, directory = files, files.plan, files.directory
    _refuse_misfits(the_plan, [layout])
    _refuse_other_target(the_plan, target, layout)
    return EXPORTERS[layout].write(
        snapshot,
        the_plan,
        source_directory=directory,
        out=Path(path),
        float_dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def export_graph(run: Run, path: Path, *, sample: Any = None) -> Run:
    """Write a quantized model as the single file ``path``; its weights beside it where a protobuf cannot hold them.

    Returns:
        ``run``, whose record now knows the path and the bytes written.

    Raises:
        UserError: the model becomes several graphs, cannot be written, or ``path`` is a directory.
    """
    check_graph_target(path)
    with tempfile.TemporaryDirectory(prefix=".octavo-partial-", dir=path.resolve().parent) as place:
        parts = _export_model(
            run,
            MODEL_EXPORTERS["onnx"],
            out=Path(place, "onnx"),
            target="",
            sample=sample,
            float_dtype=None,
            trust_remote_code=False,
        )
        graphs = sorted(parts.glob("*.onnx"))
        if len(graphs) > 1:
            names = ", ".join(graph.name for graph in graphs)
            raise UserError(f"{path} is one file, and this model becomes {names}: use --layout onnx with --out RUN")
        written = rename_graph(graphs[0], path)
    run.record = dataclasses.replace(run.record, bytes_after=written, output=str(path))
    return run


def check_graph_target(path: Path) -> None:
    """Raise ``UserError`` now if ``export_graph`` could not write ``path`` later."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError(
            f"cannot write {path}: " + ("it is a directory" if path.is_dir() else "its directory is missing")
        )


def _export_model(
    run: Run | str | Path,
    writer: ModelExporter,
    *,
    out: Path,
    target: str,
    sample: Any,
    float_dtype: torch.dtype | None,
    use_cache: bool = True,
    trust_remote_code: bool,
) -> Path:
    """Write a layout that is made from the model itself."""
    simulated = run if isinstance(run, Run) else load(run, sample=sample, trust_remote_code=trust_remote_code)
    _refuse_misfits(simulated.plan, [writer.name])
    _refuse_other_target(simulated.plan, target, writer.name)
    batch = example_inputs(simulated.loaded) if sample is None else sample
    return written_from_model(
        writer,
        simulated.loaded,
        dataclasses.replace(simulated.plan, target=target or simulated.plan.target),
        simulated.door.snapshot().layers(),
        batch,
        out=out,
        float_dtype=float_dtype,
        use_cache=use_cache,
        trust_remote_code=trust_remote_code,
    )


def _refuse_other_target(the_plan: Plan, target: str, layout: str) -> None:
    """Raise ``UserError`` when files for ``target`` would mean something else than what was simulated."""
    wanted = target_named(target)
    if not target or target == the_plan.target:
        return
    wanted_of_all = with_sums([for_target(decision, wanted) for decision in the_plan.decisions], wanted)
    for decision, asked in zip(the_plan.decisions, wanted_of_all, strict=True):
        why = _other_meaning(decision, asked, target_named(the_plan.target), wanted)
        if why:
            raise UserError(
                f"this run was made for {the_plan.target or 'any target'}: {why}. Quantize for it:  octavo quantize "
                f"{the_plan.facts.model} --recipe {the_plan.recipe} --target {target} --layout {layout} ..."
            )


def _other_meaning(decision: Decision, asked: Decision, made: Target, wanted: Target) -> str:
    """What of a decision would mean something else on ``wanted`` than it was simulated as; empty when nothing would."""
    if asked != decision:
        slot = next(slot for slot in asked.scheme if asked.scheme[slot] != decision.scheme.get(slot))
        name = quantizer_name(decision.site.name, slot)
        return f"'{name}' is {decision.scheme.get(slot, 'not there')}, and {wanted.name} wants {asked.scheme[slot]}"
    if made.saturates_at(decision.site, decision.scheme) != wanted.saturates_at(decision.site, decision.scheme):
        return f"sums in '{decision.site.name}' saturate on one of the two, which its simulation knew"
    return ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What the files mean, held against what was simulated.

    Args:
        weights: Every weight, tensor and scale, bit by bit.
        num_batches: Batches whose outputs were compared, 0 without data.
        worst_output: Largest absolute difference of any output value, ``None`` without data.
        graphs: Of a layout that runs by itself: what running each file says.
    """

    weights: Comparison
    num_batches: int = 0
    worst_output: float | None = None
    graphs: tuple[Agreement, ...] = ()

    @property
    def agrees(self) -> bool:
        """No difference anywhere."""
        return self.weights.agrees and not self.worst_output and all(graph.agrees for graph in self.graphs)

    def to_json_object(self) -> dict[str, Any]:
        """Plain JSON values."""
        outputs: dict[str, Any] = {"num_batches": self.num_batches, "worst_output": self.worst_output}
        if self.graphs:
            outputs["graphs"] = [graph.to_json_object() for graph in self.graphs]
        return {"schema": "octavo.verification/1", **self.weights.to_json_object(), **outputs, "agrees": self.agrees}


def verify(path: str | Path, run: Run | str | Path, data: Any = None, *, track: Track = silent) -> Verification:
    """Read a checkpoint with code that shares nothing with its writer, and compare it with the simulation.

    Args:
        path: A run directory or an exported checkpoint.
        run: The quantized model it was made of, or its run directory.
        data: Batches; given these, a second model is filled with what was read, and its outputs are compared, too.
        track: Told of every batch.

    Raises:
        UserError: no checkpoint there, or its files do not fit together.
    """
    run = run if isinstance(run, Run) else load(run)
    path = Path(path)
    for writer in MODEL_EXPORTERS.values():
        if writer.is_previous(path):
            return _verify_by_running(writer, path, run, data, track)
    comparison = compare_weights(
        path,
        ((key, array_of(value)) for key, value in run.door.simulated_weights()),
        tensors=((key, array_of(value)) for key, value in run.door.snapshot().passthrough()),
        activations=run.door.activation_scales(),
        extras=((name, array_of(value)) for name, value in run.door.simulated_extras()),
    )
    if data is None or comparison.missing:
        return Verification(comparison)
    twin = _filled_from_files(run, path)
    worst, num_batches = 0.0, 0
    for batch in track(as_batches(data), "verify"):
        for ours, theirs in zip(tensors_in(run.door.run(batch)), tensors_in(twin.run(batch)), strict=True):
            worst = max(worst, float((ours.double() - theirs.double()).abs().max())) if ours.numel() else worst
        num_batches += 1
    return Verification(comparison, num_batches, worst)


def _verify_by_running(writer: ModelExporter, path: Path, run: Run, data: Any, track: Track) -> Verification:
    """Files that run by themselves: their weights, and with data their codes and outputs."""
    batches = [] if data is None else list(track(as_batches(data), "verify"))
    unquantized = run.door.disabled(lambda name: True)
    graphs = tuple(writer.check(path, run.loaded, run.door.snapshot().layers(), batches, unquantized))
    stored = {name for graph in graphs for name in graph.missing}
    comparison = Comparison(
        num_weights=sum(graph.num_weights for graph in graphs),
        num_tensors=0,
        num_activations=sum(int(graph.to_json_object()["num_nodes"]) for graph in graphs),
        num_values=sum(graph.num_values for graph in graphs),
        differences=tuple(
            Difference(name, f"{count} values differ", count)
            for graph in graphs
            for name, count in graph.different_weights.items()
        ),
        extra=tuple(sorted(stored)),
    )
    return Verification(comparison, len(batches), None, graphs)


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


def _door(loaded: LoadedModel, sample: Any) -> Door:
    open_door = next(door for kind, door in DOORS.items() if isinstance(loaded.model, kind))
    return open_door(loaded.model, loaded.source, example_inputs(loaded) if sample is None else sample)


def _door_on(loaded: LoadedModel, batches: Iterable[Any]) -> Door:
    """Looks at the model with a few rows of the first batch, or all of them where few might not show everything."""
    batch = _first(batches)
    few = few_rows(batch)
    if few is not None:
        door = _door(loaded, few)
        with suppress(Exception):  # a model that wants its rows all together says so again, or not
            facts = door.facts()
            if not facts.experts and not any(site.unreached for site in facts.sites):
                return door
    return _door(loaded, batch)


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


def _first(batches: Iterable[Any]) -> Any:
    first = next(iter(batches), None)
    if first is None:
        raise UserError("the calibration data is empty: it gave no batch")
    return first


def _refuse_early(
    the_plan: Plan, batches: Iterable[Any] | None, layouts: Iterable[str], tasks: Sequence[Task], loaded: LoadedModel
) -> None:
    """Everything that can be known to fail, before any work."""
    if batches is None:
        require_no_data(the_plan)
    _refuse_misfits(the_plan, layouts)
    for task in tasks:
        task.check(loaded)


def _take_back(door: Door, error: BaseException) -> None:
    try:
        door.strip()
    except UserError as refusal:
        error.add_note(str(refusal))


def _refuse_steps(the_plan: Plan, recipe: Recipe, batches: Iterable[Any] | None, layouts: Iterable[str]) -> None:
    _refuse_step_misfits(the_plan, recipe, layouts)
    if batches is None:
        require_data_for(make_algorithms(recipe.steps))


def _refuse_step_misfits(the_plan: Plan, recipe: Recipe, layouts: Iterable[str]) -> None:
    chosen = matchers(the_plan, recipe.steps)
    for layout in layouts:
        _refuse(layout, exporter(layout, LAYOUTS).step_problems(the_plan, chosen))


def _left_beside(door: Door, the_plan: Plan) -> dict[str, Beside]:
    """Site -> what algorithms have left beside it."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in door.simulated_extras():
        site, _, part = name.removesuffix(".a").rpartition(".")
        match part:
            case "pre_scale":
                found.setdefault(site, {})["num_scales"] = tensor.numel()
            case "low_rank":
                found.setdefault(site, {})["rank"] = len(tensor)
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
    return frozenset().union(*(exporter(layout, LAYOUTS).folds_only(the_plan) for layout in layouts))


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


def _refuse_misfits(the_plan: Plan, layouts: Iterable[str]) -> None:
    for layout in layouts:
        _refuse(layout, exporter(layout, LAYOUTS).problems(the_plan))


def _refuse(layout: str, problems: Sequence[str]) -> None:
    if problems:
        folded = fold_problems(problems)
        shown = "".join(f"\n  {problem}" for problem in folded[:5])
        more = f"\n  and {len(folded) - 5} more" if len(folded) > 5 else ""
        raise UserError(f"layout '{layout}' cannot hold this plan:{shown}{more}")


def _skeleton(files: RunFiles, model: nn.Module | None, device: str, trust_remote_code: bool) -> LoadedModel:
    """The saved model without its weights."""
    if model is not None:
        return describe_module(model.to(device))
    if describes_model(files.directory):
        floats = (tensor.dtype for _, tensor in files.passthrough() if tensor.is_floating_point())
        dtype = next(floats, torch.float32)
        return open_untrained(files.directory, device=device, dtype=str(dtype).removeprefix("torch."))
    if is_callable_name(files.record.model):
        return open_model(files.record.model, device=device, trust_remote_code=trust_remote_code)
    raise UserError(
        f"run {files.directory} was made from a module in memory ({files.plan.facts.type_name}): "
        "build it again and pass it, octavo.load(path, model)"
    )


def _state_dict(files: RunFiles) -> dict[str, torch.Tensor]:
    """Everything the model had, the quantized weights as what their codes mean."""
    tensors = dict(files.passthrough()) | dict(dequantized_weights(files))
    return tensors | {alias: tensors[owner] for alias, owner in files.tied().items()}


def _filled_from_files(run: Run, path: Path) -> Door:
    """A copy of the simulation whose weights, tensors and activation scales are those an independent reader found."""
    checkpoint = open_checkpoint(path)
    scales, extras = run.door.activation_scales(), dict(run.door.simulated_extras())
    return run.door.twin(
        {key: torch.from_numpy(entry.dequantize()) for key, entry in checkpoint.weights.items()},
        {key: tensor_of(stored.read()) for key, stored in checkpoint.tensors.items()},
        {
            name: tensor_of(entry.read_scale(scales[name])).reshape(())
            for name, entry in checkpoint.activations.items()
            if entry.scale is not None and name in scales
        },
        {
            name: tensor_of(entry.read(array_of(extras[name])))
            for name, entry in checkpoint.extras.items()
            if name in extras
        },
    )


def _experts_records(the_plan: Plan, tokens: Mapping[str, Sequence[int]]) -> tuple[ExpertsRecord, ...]:
    policy = the_plan.experts.rare.value if the_plan.experts is not None else ""
    return tuple(ExpertsRecord(name=name, policy=policy, tokens=list(counts)) for name, counts in tokens.items())


def _sensitivity_records(the_plan: Plan, ranked: Sequence[Sensitivity], metric: str) -> tuple[SensitivityRecord, ...]:
    """Rows for a record: quantizer, metric, cost and format."""
    formats = {name: str(spec) for name, spec in the_plan.quantizers()}
    return tuple(
        SensitivityRecord(quantizer=row.quantizer, metric=metric, cost=row.cost, format=formats.get(row.quantizer, ""))
        for row in ranked
    )


def _measure(
    loaded: LoadedModel, tasks: Sequence[Task], references: Mapping[str, Outputs | None], track: Track, label: str
) -> dict[str, dict[str, Measure]]:
    return {task.name: task.evaluate(loaded, references.get(task.name)) for task in track(tasks, f"evaluate {label}")}
