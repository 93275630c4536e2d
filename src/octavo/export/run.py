"""The run directory: octavo's own layout. It holds every format and gives back every bit.

See docs/formats/run.md. The weights file is not called ``model.safetensors`` on purpose: a program that took the
directory for an ordinary checkpoint would find none of the weights it expects, and might fill in random ones.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.errors import UserError
from octavo.export.checkpoint import write_json, written_checkpoint
from octavo.export.companions import read_json
from octavo.export.layout import LAYOUT_SCHEMA, layer_layout, layer_to_dict
from octavo.export.publish import check_target
from octavo.export.qtensor_files import qtensor_parts
from octavo.export.shards import MAX_SHARD_BYTES, ShardWriter
from octavo.numerics.snapshot import LayerSnapshot, Snapshot
from octavo.spec.facts import QUANTIZER_NAMES
from octavo.spec.plan import Plan
from octavo.spec.records import RunRecord

STEM = "quantized"
LOW_RANK_PARTS = ("low_rank.a", "low_rank.b")


def write_run(
    snapshot: Snapshot,
    plan: Plan,
    *,
    recipe: str,
    record: RunRecord,
    source_directory: Path | None,
    out: Path,
    write_skeleton: Callable[[Path], None] = lambda directory: None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> RunRecord:
    """Write the run directory ``out``.

    Args:
        snapshot: The quantized model.
        plan: What was asked for.
        recipe: The recipe as YAML text.
        record: What is known of the run so far; ``write_record`` replaces it later.
        source_directory: Where the model's own files lie; ``None`` for a model without a directory.
        out: Final name; an earlier run there is replaced at the very end.
        write_skeleton: Adds what is needed to build the model again (``Door.write_skeleton``).
        trust_remote_code: Copy the model's Python files, too.
        max_shard_bytes: Size of one weights file.

    Returns:
        The record as written: with the tensor bytes in the files, and with the path.

    Raises:
        UserError: ``out`` holds something else, or the disk is too small. Then it is as before.
    """
    with written_checkpoint(
        out,
        plan,
        kind="a run",
        is_previous=is_run,
        source_directory=source_directory,
        trust_remote_code=trust_remote_code,
    ) as partial:
        write_skeleton(partial)
        (partial / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
        (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
        with ShardWriter(partial, stem=STEM, max_shard_bytes=max_shard_bytes) as writer:
            layers = [_write_layer(layer, writer) for layer in snapshot.layers()]
            for name, tensor in snapshot.passthrough():
                writer.add(name, tensor)
            written = writer.close()
        layout = {"schema": LAYOUT_SCHEMA, "layers": layers, "tied": dict(snapshot.tied())}
        write_json(partial / "layout.json", layout)
        record = dataclasses.replace(record, bytes_after=written.tensor_bytes, output=str(out))
        (partial / "run.json").write_text(record.to_json() + "\n", encoding="utf-8")
    return record


def write_record(run: Path, record: RunRecord) -> None:
    """Replace the record of an existing run, in one step.

    Raises:
        UserError: ``run`` is not a run directory.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run directory: it has no run.json that octavo wrote")
    fresh = run / f".run-{secrets.token_hex(4)}.json"
    try:
        fresh.write_text(record.to_json() + "\n", encoding="utf-8")
        os.replace(fresh, run / "run.json")
    finally:
        fresh.unlink(missing_ok=True)


def is_run(directory: Path) -> bool:
    """Whether ``directory`` is a run that octavo wrote, of whatever version."""
    path = directory / "run.json"
    try:
        return path.is_file() and str(read_json(path).get("schema", "")).startswith("octavo.run/")
    except UserError:
        return False


def check_run_target(out: Path) -> None:
    """Raise ``UserError`` now if ``write_run`` would refuse ``out`` later."""
    check_target(out.expanduser().resolve(), kind="a run", is_previous=is_run)


def _write_layer(layer: LayerSnapshot, writer: ShardWriter) -> dict[str, Any]:
    """The layer's tensors go into the files, what is left of it into ``layout.json``."""
    if layer.weight is not None:
        for name, tensor in qtensor_parts(layer.weight_name, layer.weight):
            writer.add(name, tensor)
    for slot, activation in layer.activations.items():
        for part, value in (("scale", activation.scale), ("zero_point", activation.zero_point)):
            if value is not None:
                writer.add(f"{layer.name}.{QUANTIZER_NAMES[slot]}.{part}", value)
    if layer.pre_scale is not None:
        writer.add(f"{layer.name}.pre_scale", layer.pre_scale)
    for part, factor in zip(LOW_RANK_PARTS, layer.low_rank or (), strict=False):
        writer.add(f"{layer.name}.{part}", factor)
    return layer_to_dict(layer_layout(layer))
