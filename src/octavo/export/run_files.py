"""A run directory, opened: plan, recipe, record, and the quantized model as a snapshot, read layer by layer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import UserError
from octavo.export.companions import read_json
from octavo.export.layout import LAYOUT_SCHEMA, ActivationLayout, LayerLayout, layer_from_dict
from octavo.export.qtensor_files import qtensor_names, read_qtensor
from octavo.export.run import LOW_RANK_PARTS, STEM
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.plan import Plan
from octavo.spec.records import RunRecord


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What lies in a run directory. It is a ``Snapshot``: exporters take it as they take a model.

    Args:
        directory: The run directory, which also holds the model's own config and tokenizer.
        plan: What was asked for.
        recipe: The recipe as YAML text.
        record: What was measured.
        entries: Every layer without its tensors.
        aliases: State-dict keys that are other names of a tensor.
        shards: Tensor name -> file.
    """

    directory: Path
    plan: Plan
    recipe: str
    record: RunRecord
    entries: tuple[LayerLayout, ...]
    aliases: Mapping[str, str]
    shards: Mapping[str, Path]

    def layers(self) -> Iterator[LayerSnapshot]:
        """Every quantized site, its tensors read when asked for."""
        for entry in self.entries:
            yield self._layer(entry)

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        """State-dict entries that stayed as they are."""
        claimed = {name for entry in self.entries for name in _claimed_names(entry)}
        for name in self.shards:
            if name not in claimed:
                yield name, self.tensor(name)

    def tied(self) -> Mapping[str, str]:
        """``alias -> owner``."""
        return self.aliases

    def tensor(self, name: str) -> Tensor:
        """One tensor of the files.

        Raises:
            UserError: it is missing, or its file is damaged.
        """
        if name not in self.shards:
            raise UserError(f"run {self.directory}: tensor {name!r} is missing: the directory is damaged or incomplete")
        path = self.shards[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise UserError(f"run {self.directory}: cannot read {path.name}: {error}") from error

    def _layer(self, entry: LayerLayout) -> LayerSnapshot:
        weight = entry.weight
        activations = {
            slot: self._activation(f"{entry.name}.{QUANTIZER_NAMES[slot]}", layout)
            for slot, layout in entry.activations.items()
        }
        pre_scale = self.tensor(f"{entry.name}.pre_scale") if entry.has_pre_scale else None
        a, b = (self.tensor(f"{entry.name}.{part}") if entry.has_low_rank else None for part in LOW_RANK_PARTS)
        layer = LayerSnapshot(
            entry.name,
            entry.operation,
            activations=activations,
            pre_scale=pre_scale,
            input_rotation=entry.input_rotation,
            low_rank=(a, b) if a is not None and b is not None else None,
            fusion_group=entry.fusion_group,
        )
        if weight is None:
            return layer
        return replace(
            layer,
            weight_name=weight.key,
            weight=read_qtensor(weight.key, weight.format, weight.shape, self.tensor),
            weight_shape=weight.parameter_shape,
            is_transposed=weight.is_transposed,
        )

    def _activation(self, quantizer: str, layout: ActivationLayout) -> ActivationScale:
        scale = self.tensor(f"{quantizer}.scale") if layout.has_scale else None
        zero_point = self.tensor(f"{quantizer}.zero_point") if layout.has_zero_point else None
        return ActivationScale(layout.format, layout.is_dynamic, scale, zero_point)


def read_run(path: Path) -> RunFiles:
    """Open a run directory; tensors are read later, one by one.

    Raises:
        UserError: not a run directory, written by a newer octavo, or a part is missing or damaged.
    """
    record = _read_record(path)
    layout = read_json(path / "layout.json")
    if layout.get("schema") != LAYOUT_SCHEMA:
        raise UserError(f"{path / 'layout.json'}: schema {layout.get('schema')!r}, this octavo reads {LAYOUT_SCHEMA!r}")
    entries = tuple(layer_from_dict(data) for data in layout.get("layers", ()))
    try:
        plan = Plan.from_json((path / "plan.json").read_text(encoding="utf-8"))
        recipe = (path / "recipe.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"run {path}: {error.strerror}: {error.filename}") from error
    return RunFiles(path, plan, recipe, record, entries, layout.get("tied", {}), _find_shards(path))


def _read_record(path: Path) -> RunRecord:
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run directory: it has no run.json (`octavo quantize --out DIR` writes one)")
    try:
        return RunRecord.from_json_object(read_json(path / "run.json"))
    except UserError as error:
        raise UserError(f"{path / 'run.json'}: {error}") from error


def _find_shards(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the headers."""
    files = sorted(path.glob(f"{STEM}.safetensors")) or sorted(path.glob(f"{STEM}-*-of-*.safetensors"))
    promised = int(files[-1].stem.rpartition("-")[2]) if files and files[0].stem != STEM else 1
    if len(files) != promised:
        there = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"run {path}: {promised} {STEM} safetensors files belong here, there are {there}: copy it again"
        )
    shards: dict[str, Path] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"run {path}: cannot read {file.name}: {error}") from error
            shards.update(dict.fromkeys(_names_as_written(file), file))
    return shards


def _names_as_written(path: Path) -> list[str]:
    """Tensor names in the order of the header; ``safe_open`` sorts them, and a later export would, too."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return [name for name in json.loads(file.read(size)) if name != "__metadata__"]


def _claimed_names(entry: LayerLayout) -> Iterator[str]:
    """The names of a layer's tensors in the files."""
    if entry.weight is not None:
        yield from qtensor_names(entry.weight.key, entry.weight.format)
    for slot in entry.activations:
        yield from _activation_names(entry.name, slot)
    yield from (f"{entry.name}.{part}" for part in ("pre_scale", *LOW_RANK_PARTS))


def _activation_names(site: str, slot: Slot) -> Iterator[str]:
    quantizer = f"{site}.{QUANTIZER_NAMES[slot]}"
    yield f"{quantizer}.scale"
    yield f"{quantizer}.zero_point"
