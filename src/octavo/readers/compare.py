"""Holds the files of a checkpoint against what was simulated, value by value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octavo.readers.checkpoint import Checkpoint
from octavo.readers.opening import open_checkpoint

Named = Iterable[tuple[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Difference:
    """An entry whose values differ. ``first`` is the index of the first of them, in C order."""

    name: str
    text: str
    num_different: int = 0
    max_abs: float = 0.0
    first: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome: what was compared, and everything that does not agree.

    Args:
        num_weights: Quantized weights compared.
        num_tensors: Tensors compared that are stored as they were.
        num_activations: Activation scales compared.
        num_values: Values in all of them.
        differences: Entries that differ.
        missing: Names that were expected and are not in the files.
        extra: Names in the files that nobody expected.
        narrowed: Tensors that the files hold in a narrower dtype; they were compared in that dtype.
    """

    num_weights: int
    num_tensors: int
    num_activations: int
    num_values: int
    differences: tuple[Difference, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Every bit is as expected, nothing is missing and nothing is left over."""
        return not (self.differences or self.missing or self.extra)

    def to_json_object(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"agrees": self.agrees, **asdict(self)}


@dataclass(slots=True)
class _Tally:
    num_values: int = 0
    differences: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)


def compare_weights(
    path: Path,
    weights: Named,
    *,
    tensors: Named | None = None,
    activations: Mapping[str, float] | None = None,
    extras: Named | None = None,
) -> Comparison:
    """Read the checkpoint ``path`` with the independent reader and compare it with the simulation, bit by bit.

    Args:
        path: A run directory or an exported checkpoint.
        weights: State-dict key and simulated value of every quantized weight, in the parameter's shape. What is read is
            computed in fp32 and rounded to the dtype given here.
        tensors: State-dict entries that stay as they are, rounded to the stored dtype first; ``None``: not compared.
        activations: Full quantizer name -> scale of every static quantizer; ``None``: not compared.
        extras: ``<site>.<part>`` and value of what layers divide their inputs by, of low-rank branches, and the size of
            blocks that inputs are rotated in (``pre_scale``, ``low_rank.a``, ``low_rank.b``, ``input_rotation``),
            rounded to the stored dtype first; ``None``: not compared.

    Raises:
        UserError: no checkpoint there, or its files do not fit together.
    """
    checkpoint = open_checkpoint(path)
    tally = _Tally()
    num_weights = _compare_all(_weight_pairs(checkpoint, weights, tally), tally)
    num_tensors = 0 if tensors is None else _compare_all(_tensor_pairs(checkpoint, tensors, tally), tally)
    num_tensors += 0 if extras is None else _compare_all(_extra_pairs(checkpoint, extras, tally), tally)
    num_activations = 0
    if activations is not None:
        num_activations = _compare_all(_scale_pairs(checkpoint, activations, tally), tally)
    return Comparison(
        num_weights,
        num_tensors,
        num_activations,
        tally.num_values,
        tuple(tally.differences),
        tuple(tally.missing),
        tuple(tally.extra),
        tuple(tally.narrowed),
    )


Pair = tuple[str, np.ndarray, np.ndarray]


def _weight_pairs(checkpoint: Checkpoint, expected: Named, tally: _Tally) -> Iterator[Pair]:
    seen = set()
    for name, value in expected:
        seen.add(name)
        if name in checkpoint.weights:
            yield name, checkpoint.weights[name].dequantize().astype(value.dtype), value
        else:
            tally.missing.append(name)
    tally.extra += [name for name in checkpoint.weights if name not in seen]


def _tensor_pairs(checkpoint: Checkpoint, expected: Named, tally: _Tally) -> Iterator[Pair]:
    seen = set()
    for name, value in expected:
        seen.add(name)
        if name not in checkpoint.tensors:
            tally.missing.append(name)
            continue
        found = checkpoint.tensors[name].read()
        if found.dtype.itemsize < value.dtype.itemsize:
            tally.narrowed.append(name)
        yield name, found, value.astype(found.dtype)
    tally.extra += [name for name in checkpoint.tensors if name not in seen]


def _extra_pairs(checkpoint: Checkpoint, expected: Named, tally: _Tally) -> Iterator[Pair]:
    found = {name: entry.stored.read() for name, entry in checkpoint.extras.items()}
    found |= {f"{site}.input_rotation": np.asarray(size) for site, size in checkpoint.rotations.items()}
    seen = set()
    for name, value in expected:
        seen.add(name)
        if name not in found:
            tally.missing.append(name)
            continue
        if found[name].dtype.itemsize < value.dtype.itemsize:
            tally.narrowed.append(name)
        entry = checkpoint.extras.get(name)
        meant = np.reciprocal(value) if entry is not None and entry.is_reciprocal else value
        yield name, found[name], meant.astype(found[name].dtype)
    neutral = {name for name in found if name.endswith(".pre_scale") and bool(np.all(found[name] == 1))}
    tally.extra += [name for name in found if name not in seen and name not in neutral]


def _scale_pairs(checkpoint: Checkpoint, expected: Mapping[str, float], tally: _Tally) -> Iterator[Pair]:
    found = {entry.name: entry for entry in checkpoint.activations.values() if entry.scale is not None}
    for name, value in expected.items():
        if name in found:
            entry = found[name]
            assert entry.scale is not None
            scale = entry.scale.read()
            yield name, scale, np.asarray(value, dtype=scale.dtype) * scale.dtype.type(entry.stored_factor)
        else:
            tally.missing.append(name)
    tally.extra += [name for name in found if name not in expected]


def _compare_all(pairs: Iterable[Pair], tally: _Tally) -> int:
    count = 0
    for name, found, expected in pairs:
        count += 1
        tally.num_values += expected.size
        difference = _difference(name, found, expected)
        if difference is not None:
            tally.differences.append(difference)
    return count


def _difference(name: str, found: np.ndarray, expected: np.ndarray) -> Difference | None:
    if found.shape != expected.shape:
        return Difference(name, f"the files hold shape {found.shape}, the simulation {expected.shape}")
    if found.tobytes() == expected.tobytes():
        return None
    bits = f"V{found.dtype.itemsize}"
    where = np.ascontiguousarray(found).view(bits) != np.ascontiguousarray(expected).view(bits)
    first = tuple(int(axis) for axis in np.unravel_index(int(np.argmax(where)), found.shape))
    gaps = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    text = f"at {list(first)} the files hold {found[first]}, the simulation {expected[first]}"
    return Difference(name, text, int(np.count_nonzero(where)), float(np.max(gaps)), first)
