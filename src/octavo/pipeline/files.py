"""Runs and checkpoints on disk."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.calibrate.checkpoint import removed
from octavo.errors import UserError
from octavo.export.base import EXPORTERS, ModelExporter, exporter, written_from_model
from octavo.export.run import write_run
from octavo.export.run_files import RunFiles, read_run
from octavo.export.views import dequantized_weights
from octavo.numerics.snapshot import Snapshot
from octavo.onnx.layout import rename_graph
from octavo.pipeline.refusals import refuse_misfits, refuse_other_target
from octavo.pipeline.runs import LAYOUTS, MODEL_EXPORTERS, Run, door_on_sample
from octavo.sources import LoadedModel, describe_module, open_model, open_untrained
from octavo.sources.example import example_inputs
from octavo.sources.extras import is_callable_name
from octavo.sources.models import describes_model
from octavo.sources.shapes import stored_sample
from octavo.spec.recipe import read_recipe


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
        sample: One batch for the traced forward; see ``plan``. Unless given, one of the shapes that the run kept.
        device: Where the model goes.
        trust_remote_code: Run code that lies beside the weights.

    Raises:
        UserError: not a run, damaged, or of another model.
    """
    path = Path(path)
    files = read_run(path)
    loaded = _skeleton(files, model, device, trust_remote_code)
    loaded.source = files.record.model
    if sample is None and example_inputs(loaded) is None:
        sample = stored_sample(path)
    door = door_on_sample(loaded, sample)
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
    refuse_misfits(the_plan, [layout])
    refuse_other_target(the_plan, target, layout)
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
    refuse_misfits(simulated.plan, [writer.name])
    refuse_other_target(simulated.plan, target, writer.name)
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
