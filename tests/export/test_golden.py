"""The bytes on the disk do not change by accident: names, dtypes, shapes and SHA-256 of what was written once.

The inputs are multiples of 1/32, and every step from them to the files is exact or correctly rounded, so the sums are
the same on every machine. After a change on purpose:  OCTAVO_WRITE_GOLDEN=1 pytest tests/export/test_golden.py
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.handmade import Handmade, add_attention, add_layer, small_fp8
from octavo.export.base import EXPORTERS
from octavo.export.run import write_run
from octavo.readers.tensor_files import read_header
from octavo.spec.records import RunRecord
from octavo.spec.version import VERSION

GOLDEN = Path(__file__).parents[1] / "golden" / "export.json"
OTHERS_BUSINESS = ("run.json", "plan.json")


def mixed() -> Handmade:
    """One layer of every kind that all layouts hold."""
    made = Handmade()
    add_layer(made, "conv", (4, 3, 2, 2), "int8-channel", operation="conv")
    add_layer(made, "up", (6, 128), "int8-channel", "int8-tensor")
    add_layer(made, "token", (6, 8), "e4m3-channel", "e4m3-token", is_dynamic=True)
    add_layer(made, "group", (6, 256), "int4-group128")
    add_layer(made, "inputs_first", (128, 6), "int4-group64", is_transposed=True)
    add_layer(made, "head", (4, 16), None)
    return made


def everything() -> Handmade:
    """What only the run directory holds, too."""
    made = mixed()
    add_layer(made, "odd", (3, 7), "int3-channel-asymmetric", "int8-tensor-asymmetric")
    add_layer(made, "wide", (2, 64), "e5m2-group32")
    add_attention(made, "attention", key="int8-tensor", value="e4m3-token")
    return made


def blocks() -> Handmade:
    """Scales in groups and tiles, and the scales of a cache."""
    made = Handmade()
    add_layer(made, "nv", (4, 64), "nvfp4", "nvfp4")
    add_layer(made, "nv_alone", (64, 6), "nvfp4", is_transposed=True)
    add_layer(made, "nv_in_fp8", (4, 64), "nvfp4-in-fp8", "e4m3-tensor")
    add_layer(made, "mx4", (4, 64), "mxfp4", "mxfp4", is_dynamic=True)
    add_layer(made, "mx4_in_fp8", (4, 64), "mxfp4-ceil", "e4m3-tensor")
    add_layer(made, "mx8", (4, 64), "mxfp8", "mxfp8", is_dynamic=True)
    add_layer(made, "tiles", (128, 256), "e4m3-tile128x128", "e4m3-group128", is_dynamic=True)
    add_layer(made, "w4a8", (4, 64), "int4-group32", "e4m3-tensor")
    add_attention(made, "attention", key_cache="nvfp4", value_cache="nvfp4")
    return made


def all_blocks() -> Handmade:
    """Those that only the run directory holds, too."""
    made = blocks()
    for name in ("mxfp6-e3m2", "mxfp6-e2m3", "mxint8", "nf4", "int4-group32-double-quant"):
        add_layer(made, name, (4, 96), name)
    add_layer(made, "negative", (4, 64), "int4-group32-full-range")
    add_layer(made, "ragged", (3, 50), "e4m3-tile128x128")
    return made


def write_as_run(made: Handmade, out: Path) -> None:
    record = RunRecord.of_plan(made.plan)
    write_run(made, made.plan, recipe="name: golden\n", record=record, source_directory=None, out=out)


def write_as(layout: str) -> Callable[[Handmade, Path], None]:
    def write(made: Handmade, out: Path) -> None:
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)

    return write


CASES: dict[str, tuple[Callable[[], Handmade], Callable[[Handmade, Path], None]]] = {
    "run": (everything, write_as_run),
    "run, blocks": (all_blocks, write_as_run),
    **{f"{layout}, fp8": (small_fp8, write_as(layout)) for layout in EXPORTERS},
    **{f"{layout}, mixed": (mixed, write_as(layout)) for layout in EXPORTERS},
    **{f"{layout}, blocks": (blocks, write_as(layout)) for layout in EXPORTERS},
}


def manifest(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.name in OTHERS_BUSINESS:
            continue
        entry: dict[str, Any] = {
            "sha256": hashlib.sha256(path.read_bytes().replace(VERSION.encode(), b"VERSION")).hexdigest()
        }
        if path.suffix == ".safetensors":
            tensors, _ = read_header(path)
            entry["tensors"] = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        found[path.name] = entry
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_what_they_were(case: str, tmp_path: Path) -> None:
    make, write = CASES[case]
    write(make(), tmp_path / "out")
    found = manifest(tmp_path / "out")
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("OCTAVO_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**known, case: found}, indent=1) + "\n")
    else:
        assert found == known[case]
