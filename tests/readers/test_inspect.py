"""``octavo inspect``: what is there, and what looks wrong, without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from export.handmade import Handmade, add_extras, add_layer, small_fp8, some_extras
from octavo.export.base import EXPORTERS
from octavo.export.checkpoint import tensor_bytes
from octavo.export.run import write_run
from octavo.export.shards import ShardWriter
from octavo.numerics.qtensor import QTensor
from octavo.readers.inspect import Concern, inspect
from octavo.report.inspection import render_inspection
from octavo.spec.records import RunRecord


def run_of(made: Handmade, out: Path) -> Path:
    write_run(made, made.plan, recipe="", record=RunRecord.of_plan(made.plan), source_directory=None, out=out)
    return out


def test_a_run(tmp_path: Path) -> None:
    found = inspect(run_of(small_fp8(), tmp_path / "run"))
    assert found.layout == "run"
    assert found.tensor_bytes == tensor_bytes(tmp_path / "run")
    rows = {row.name: row for row in found.rows}
    up = rows["blocks.0.up.weight"]
    assert (up.kind, up.format, up.shape, up.num_values, up.num_bytes) == (
        "weight",
        "e4m3 per tensor",
        (8, 16),
        128,
        132,
    )
    assert rows["blocks.0.attention.softmax_quantizer"].kind == "activation"
    assert rows["norm.weight"].format == "F32"
    assert [(count.kind, count.format, count.num_entries) for count in found.counts] == [
        ("weight", "e4m3 per tensor", 2),
        ("activation", "e4m3 per tensor", 4),
        ("tensor", "I64", 1),
        ("tensor", "F32", 2),
    ]
    assert found.concerns == ()


def test_a_modelopt_checkpoint(tmp_path: Path) -> None:
    made = small_fp8()
    out = EXPORTERS["modelopt"].write(made, made.plan, source_directory=None, out=tmp_path / "out", float_dtype=None)
    found = inspect(out)
    assert found.layout == "modelopt"
    assert found.facts["algorithm"] == "FP8"
    assert found.facts["producer"].startswith("octavo ")
    assert found.tensor_bytes == tensor_bytes(out)


def test_a_plain_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert (found.layout, found.facts, found.tensor_bytes) == ("plain", {}, 12)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert inspect(tmp_path).facts == {"quantization": "gptq (listed as raw tensors)"}


TINY = 1e-40
SUSPICIOUS = {
    "zero": ([0.0, 1, 2, 3], "1 of 4 scales is 0"),
    "nan": ([float("nan"), float("nan"), 2, 3], "2 of 4 scales are NaN"),
    "infinite": ([float("inf"), 1, 2, 3], "1 of 4 scales is infinite"),
    "negative": ([-1.0, 1, 2, 3], "1 of 4 scales is negative"),
    "denormal": ([TINY, 1, 2, 3], "1 of 4 scales is too small for a normal fp32 number"),
    "default": ([1.0, 1, 1, 1], "all 4 scales are exactly 1.0, as when nothing was calibrated"),
}


@pytest.mark.parametrize("layout", ["run", "modelopt"])
@pytest.mark.parametrize("issue", SUSPICIOUS)
def test_suspicious_scales(layout: str, issue: str, tmp_path: Path) -> None:
    values, text = SUSPICIOUS[issue]
    made = Handmade()
    add_layer(made, "up", (4, 8), "int8-channel")
    weight = made.members[0].weight
    assert weight is not None
    assert isinstance(weight.scale, torch.Tensor)
    weight.scale.copy_(torch.tensor(values))
    if layout == "run":
        out, name = run_of(made, tmp_path / "out"), "up.weight.scale"
    else:
        out, name = tmp_path / "out", "up.weight_scale"
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    assert inspect(out).concerns == (Concern(name, issue, text),)


CODES = {  # of a scale in 8 bits: NaN, and 0
    "nvfp4": (0x7F, {"run": ("up.weight.scale",), "modelopt": ("up.weight_scale",)}),
    "mxfp4": (0xFF, {"run": ("up.weight.scale",), "modelopt": ("up.weight_scale",)}),
}


@pytest.mark.parametrize("layout", ["run", "modelopt"])
@pytest.mark.parametrize("fmt", CODES)
def test_scales_in_8_bits_are_looked_at_by_what_they_mean(layout: str, fmt: str, tmp_path: Path) -> None:
    code, names = CODES[fmt]
    made = Handmade()
    add_layer(made, "up", (4, 64), fmt)
    weight = made.members[0].weight
    assert weight is not None
    assert isinstance(weight.scale, QTensor)
    weight.scale.codes[0, 0] = code
    if layout == "run":
        out = run_of(made, tmp_path / "out")
    else:
        out = tmp_path / "out"
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    found = [concern for concern in inspect(out).concerns if concern.issue == "nan"]
    assert [concern.name for concern in found] == list(names[layout])
    assert found[0].text.startswith("1 of ")


@pytest.mark.parametrize("layout", ["run", "modelopt"])
def test_scales_of_the_full_range_may_be_negative(layout: str, tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 64), "int4-group32-full-range")
    weight = made.members[0].weight
    assert weight is not None
    assert bool((weight.scale < 0).any())  # type: ignore[operator]
    out = tmp_path / "out"
    if layout == "run":
        run_of(made, out)
    else:
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    assert inspect(out).concerns == ()


@pytest.mark.parametrize("layout", ["run", "modelopt"])
def test_what_lies_beside_a_layer_is_listed(layout: str, tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), "nvfp4", "nvfp4")
    add_extras(made, **some_extras(4, 128))
    out = tmp_path / "out"
    if layout == "run":
        run_of(made, out)
    else:
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    found = inspect(out)
    rows = {row.name: (row.kind, row.format, row.shape) for row in found.rows if row.kind == "extra"}
    assert rows == {
        "up.pre_scale": ("extra", "pre_scale", (128,)),
        "up.low_rank.a": ("extra", "low_rank", (2, 128)),
        "up.low_rank.b": ("extra", "low_rank", (4, 2)),
    }
    assert found.tensor_bytes == tensor_bytes(out)


def test_an_input_scale_of_one_and_a_missing_one(tmp_path: Path) -> None:
    made = small_fp8()
    out = EXPORTERS["modelopt"].write(made, made.plan, source_directory=None, out=tmp_path / "out", float_dtype=None)
    found = load_file(out / "model.safetensors")
    del found["blocks.0.up.input_scale"]
    found["blocks.0.down.input_scale"] = torch.tensor(1.0)
    with ShardWriter(out, always_index=True) as writer:
        for name, value in found.items():
            writer.add(name, value)
        writer.close()
    assert {(concern.name, concern.issue) for concern in inspect(out).concerns} == {
        ("blocks.0.up.weight", "missing-input-scale"),
        ("blocks.0.down.input_scale", "default"),
    }


def test_it_is_json_and_it_can_be_shown(tmp_path: Path) -> None:
    found = inspect(run_of(small_fp8(), tmp_path / "run")).to_json_object()
    assert json.loads(json.dumps(found))["schema"] == "octavo.inspection/1"
    console = Console(file=io.StringIO(), width=100)
    console.print(render_inspection(found))
    console.print(
        render_inspection({**found, "concerns": [{"name": "a", "issue": "zero", "text": "is 0"}]}, with_entries=False)
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("run layout", "blocks.0.up.weight", "8×16", "e4m3 per tensor", "no suspicious scales", "is 0"):
        assert part in text


def test_it_runs_without_torch(tmp_path: Path) -> None:
    out = run_of(small_fp8(), tmp_path / "run")
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from octavo.readers.inspect import inspect; from octavo.report.inspection import render_inspection\n"
        f"render_inspection(inspect(Path({str(out)!r})).to_json_object()); assert not sys.modules['torch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
