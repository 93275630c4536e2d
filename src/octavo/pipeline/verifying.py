"""Files held against the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.export.base import ModelExporter
from octavo.numerics.arrays import array_of, tensor_of, tensors_in
from octavo.numerics.door import Door
from octavo.numerics.snapshot import Agreement
from octavo.pipeline.files import load
from octavo.pipeline.runs import MODEL_EXPORTERS, Run
from octavo.readers.compare import Comparison, Difference, compare_weights
from octavo.readers.opening import open_checkpoint
from octavo.report.progress import Track, silent
from octavo.sources import as_batches


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
