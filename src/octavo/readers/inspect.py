"""What is in a checkpoint: formats, shapes, sizes, and scales that look wrong. Data only; ``report`` shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.readers.checkpoint import Checkpoint
from octavo.readers.graph_file import is_graph, read_graphs
from octavo.readers.opening import open_checkpoint
from octavo.spec.records import RunRecord

INSPECTION_SCHEMA = "octavo.inspection/1"


@dataclass(frozen=True, slots=True)
class Row:
    """One entry: ``kind`` is ``weight``, ``activation``, ``extra`` or ``tensor`` (stored as it was)."""

    name: str
    kind: str
    format: str
    dtype: str
    shape: tuple[int, ...]
    num_values: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Concern:
    """Something that looks wrong: ``issue`` is one word for machines, ``text`` the sentence."""

    name: str
    issue: str
    text: str


@dataclass(frozen=True, slots=True)
class FormatCount:
    """All entries of one kind and format together."""

    kind: str
    format: str
    num_entries: int
    num_values: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint at a glance; ``tensor_bytes`` counts all tensors, headers not.

    ``blocks`` are a run's errors, block by block, where steps worked on it.
    """

    path: str
    layout: str
    facts: dict[str, str]
    rows: tuple[Row, ...]
    counts: tuple[FormatCount, ...]
    concerns: tuple[Concern, ...]
    tensor_bytes: int
    blocks: tuple[dict[str, Any], ...] = ()

    def to_json_object(self) -> dict[str, Any]:
        """Plain JSON values, for ``--json`` and for rendering."""
        return {"schema": INSPECTION_SCHEMA, **asdict(self)}


def inspect(path: Path) -> Inspection:
    """Look into the checkpoint or ``.onnx`` file ``path``: every header, and the values of the scales.

    Raises:
        UserError: no checkpoint there, or its files do not fit together.
    """
    if is_graph(path):
        return _of_graph(path)
    checkpoint = open_checkpoint(path)
    rows = tuple(_rows(checkpoint))
    counts = tuple(_count(rows))
    concerns = tuple(_concerns(checkpoint))
    total = sum(row.num_bytes for row in rows)
    facts, blocks = dict(checkpoint.facts), _blocks(path / "run.json")
    return Inspection(str(path), checkpoint.layout, facts, rows, counts, concerns, total, blocks)


def _blocks(record: Path) -> tuple[dict[str, Any], ...]:
    """What the record beside a run's files says of its blocks."""
    if not record.is_file():
        return ()
    return tuple(block.model_dump() for block in RunRecord.from_json(record.read_text(encoding="utf-8")).blocks)


def _of_graph(path: Path) -> Inspection:
    graph = read_graphs(path)
    rows = tuple(Row(e.name, e.kind, e.format, e.dtype, e.shape, e.num_values, e.num_bytes) for e in graph.entries)
    scales = {name: values for entry in graph.entries for name, values in entry.scales.items()}
    concerns = tuple(concern for name, values in scales.items() for concern in suspicious_scale(name, values))
    total = sum(row.num_bytes for row in rows)
    return Inspection(str(path), "onnx", dict(graph.facts), rows, tuple(_count(rows)), concerns, total)


def _rows(checkpoint: Checkpoint) -> Iterator[Row]:
    for weight in checkpoint.weights.values():
        values = math.prod(weight.shape)
        yield Row(weight.name, "weight", weight.format, weight.codes.dtype, weight.shape, values, weight.num_bytes)
    for entry in checkpoint.activations.values():
        scale = entry.scale
        size = sum(part.num_bytes for part in (entry.scale, entry.zero_point) if part is not None)
        kind = f"{entry.format}{', dynamic' if entry.is_dynamic else ''}"
        yield Row(entry.name, "activation", kind, scale.dtype if scale else "", scale.shape if scale else (), 0, size)
    for name, extra in checkpoint.extras.items():
        stored, part = extra.stored, name.rpartition(".low_rank.")[1].strip(".") or name.rpartition(".")[2]
        yield Row(name, "extra", part, stored.dtype, stored.shape, math.prod(stored.shape), stored.num_bytes)
    for tensor in checkpoint.tensors.values():
        values = math.prod(tensor.shape)
        yield Row(tensor.name, "tensor", tensor.dtype, tensor.dtype, tensor.shape, values, tensor.num_bytes)


def _count(rows: tuple[Row, ...]) -> Iterator[FormatCount]:
    for kind, fmt in dict.fromkeys((row.kind, row.format) for row in rows):
        members = [row for row in rows if (row.kind, row.format) == (kind, fmt)]
        num_values, num_bytes = sum(row.num_values for row in members), sum(row.num_bytes for row in members)
        yield FormatCount(kind, fmt, len(members), num_values, num_bytes)


def _concerns(checkpoint: Checkpoint) -> Iterator[Concern]:
    for weight in checkpoint.weights.values():
        for name, read in weight.real_scales.items():
            for concern in suspicious_scale(name, read()):
                if not (weight.has_signed_scales and concern.issue == "negative"):
                    yield concern
    for entry in checkpoint.activations.values():
        if entry.scale is not None:
            yield from suspicious_scale(entry.scale.name, entry.scale.read().astype(np.float32))
    for name, extra in checkpoint.extras.items():
        if name.endswith(".pre_scale"):
            found = suspicious_scale(extra.stored.name, extra.stored.read().astype(np.float32))
            yield from (concern for concern in found if concern.issue != "default")  # 1 leaves a channel as it is
    for name in checkpoint.missing_input_scales:
        text = "the format promises a calibrated input and there is no input scale (an embedding needs none)"
        yield Concern(name, "missing-input-scale", text)


_Test = Callable[[np.ndarray], np.ndarray]
_ISSUES: tuple[tuple[str, str, _Test], ...] = (
    ("nan", "NaN", np.isnan),
    ("infinite", "infinite", np.isinf),
    ("zero", "0", lambda scale: scale == 0),
    ("negative", "negative", lambda scale: scale < 0),
    ("denormal", "too small for a normal fp32 number", lambda s: (s != 0) & (np.abs(s) < np.finfo(np.float32).tiny)),
)


def suspicious_scale(name: str, values: np.ndarray) -> Iterator[Concern]:
    """What is wrong with the real values of a scale."""
    for issue, words, test in _ISSUES:
        found = int(np.count_nonzero(test(values)))
        if found:
            yield Concern(name, issue, f"{found} of {values.size} scales {'is' if found == 1 else 'are'} {words}")
    if values.size and bool(np.all(values == 1)):
        which = "the scale is" if values.size == 1 else f"all {values.size} scales are"
        yield Concern(name, "default", f"{which} exactly 1.0, as when nothing was calibrated")
