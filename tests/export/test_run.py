"""The run directory gives back every bit of every format."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from export.handmade import (
    Handmade,
    activation,
    activation_scales,
    add_attention,
    add_extras,
    add_layer,
    expected_extras,
    matrix,
    small_fp8,
    some_extras,
)
from octavo.errors import UserError
from octavo.export.checkpoint import tensor_bytes
from octavo.export.run import check_run_target, is_run, write_record, write_run
from octavo.export.run_files import read_run
from octavo.export.shards import ShardWriter
from octavo.export.views import dequantized_weights
from octavo.numerics.snapshot import LayerSnapshot
from octavo.readers.compare import compare_weights
from octavo.spec.element import E2M3, E8M0, INT8, NF4
from octavo.spec.facts import Slot
from octavo.spec.formats import FORMATS, NVFP4
from octavo.spec.records import RunRecord
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    Ragged,
    TensorFormat,
    scaled,
)

RECURSIVE = {
    "nvfp4": NVFP4,
    "mxfp6": TensorFormat(E2M3, PerGroup(32), scale=TensorFormat(E8M0)),
    "nf4 double": TensorFormat(
        NF4,
        PerFlatGroup(64),
        scale=TensorFormat(INT8, PerFlatGroup(256), scale=PLAIN_FP32, offset=PLAIN_FP32),
    ),
    "tiles": scaled(INT8, PerTile(3, 50), ragged=Ragged.PAD),
    "ragged": TensorFormat(INT8, PerGroup(48), scale=PLAIN_FP32, ragged=Ragged.PAD),
    "scale per tensor of codes": TensorFormat(INT8, PerTensor(), scale=TensorFormat(E8M0)),
}


def save(made: Handmade, out: Path, source: Path | None = None, **options: object) -> RunRecord:
    record = RunRecord.of_plan(made.plan)
    return write_run(made, made.plan, recipe="name: x\n", record=record, source_directory=source, out=out, **options)  # type: ignore[arg-type]


def same(first: object, second: object) -> bool:
    """Equal in every bit, tensors and QTensors included."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(same(getattr(first, n), getattr(second, n)) for n in names)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    return first == second


@pytest.mark.parametrize("fmt", [*FORMATS, *RECURSIVE])
def test_every_format_comes_back_bit_for_bit(fmt: str, tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "layer", (6, 128), RECURSIVE.get(fmt) or FORMATS[fmt])
    record = save(made, tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert same(list(found.layers()), made.members)
    weight = made.members[0].weight
    assert weight is not None
    assert record.bytes_after == tensor_bytes(tmp_path / "run") == weight.nbytes


def test_everything_of_a_model_comes_back(tmp_path: Path) -> None:
    made = small_fp8()
    add_layer(made, "conv", (4, 3, 2, 2), "int4-channel-asymmetric", "int8-tensor-asymmetric", operation="conv")
    add_layer(made, "gpt", (16, 6), "int3-channel", is_transposed=True)
    add_layer(made, "mixing", (4, 8), "e5m2-channel", "int8-token", is_dynamic=True)
    made.members.append(
        LayerSnapshot("lonely", "linear", activations={Slot.OUTPUT: activation("int8-tensor")}, pre_scale=matrix(4))
    )
    made.aliases["tied.weight"] = "head.weight"
    save(made, tmp_path / "run", max_shard_bytes=300)
    found = read_run(tmp_path / "run")
    assert same(list(found.layers()), made.members)
    assert same(dict(sorted(found.passthrough())), dict(sorted(made.kept)))
    assert found.tied() == made.aliases
    assert found.plan == made.plan
    assert found.recipe == "name: x\n"
    assert activation_scales(found) == activation_scales(made)
    assert all(
        torch.equal(a[1], b[1]) for a, b in zip(dequantized_weights(found), dequantized_weights(made), strict=True)
    )


def test_what_algorithms_leave_beside_a_layer_comes_back(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), "nvfp4", "nvfp4")
    add_extras(made, **some_extras(4, 128))
    add_layer(made, "turned", (4, 128), "mxfp4", "mxfp4", is_dynamic=True)
    add_extras(made, input_rotation=32)
    save(made, tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert same(list(found.layers()), made.members)
    assert list(found.passthrough()) == []
    weights = [(name, value.numpy()) for name, value in dequantized_weights(made)]
    agreed = compare_weights(tmp_path / "run", weights, tensors=(), extras=expected_extras(made))
    assert agreed.agrees, agreed
    assert agreed.num_tensors == 4
    made.members[1] = dataclasses.replace(made.members[1], input_rotation=16)
    (difference,) = compare_weights(tmp_path / "run", weights, extras=expected_extras(made)).differences
    assert difference.text == "at [] the files hold 32, the simulation 16"


def test_a_run_that_was_read_can_be_written_again(tmp_path: Path) -> None:
    made = small_fp8()
    save(made, tmp_path / "first")
    found = read_run(tmp_path / "first")
    write_run(
        found, found.plan, recipe=found.recipe, record=found.record, source_directory=None, out=tmp_path / "second"
    )
    for name in ("plan.json", "layout.json", "recipe.yaml"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert same(list(read_run(tmp_path / "second").layers()), made.members)


def test_the_same_snapshot_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(small_fp8(), tmp_path / name / "run")
    for path in (tmp_path / "a" / "run").iterdir():
        if path.name != "run.json":  # holds its own path
            assert path.read_bytes() == (tmp_path / "b" / "run" / path.name).read_bytes(), path.name


def test_the_record_can_be_replaced(tmp_path: Path) -> None:
    record = save(small_fp8(), tmp_path / "run")
    assert record.output == str(tmp_path / "run")
    write_record(tmp_path / "run", dataclasses.replace(record, seconds={"export": 1.5}))
    assert read_run(tmp_path / "run").record.seconds == {"export": 1.5}
    assert [path.name for path in tmp_path.glob("run/.*")] == []
    with pytest.raises(UserError, match="is not a run directory"):
        write_record(tmp_path, record)


@pytest.mark.slow
def test_transformers_does_not_take_a_run_for_a_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "bert"}')
    save(small_fp8(), tmp_path / "run", source)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path / "run")


def test_an_older_run_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    save(small_fp8(), tmp_path / "run")
    (tmp_path / "run" / "modelopt").mkdir()
    check_run_target(tmp_path / "run")
    save(small_fp8(), tmp_path / "run")
    assert is_run(tmp_path / "run")
    assert not (tmp_path / "run" / "modelopt").exists()
    (tmp_path / "run" / "run.json").write_text('{"schema": "someone-elses"}')
    with pytest.raises(UserError, match="the directory holds something else"):
        check_run_target(tmp_path / "run")


class Broken(NamedTuple):
    """A snapshot whose stream ends in an error."""

    made: Handmade
    error: Exception

    def layers(self) -> Iterator[LayerSnapshot]:
        yield from self.made.layers()
        raise self.error

    def passthrough(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.made.passthrough()

    def tied(self) -> dict[str, str]:
        return {}


def test_an_error_midway_leaves_the_old_run(tmp_path: Path) -> None:
    made = small_fp8()
    save(made, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, expected in ((RuntimeError("midway"), RuntimeError), (full, UserError), (OSError("other"), OSError)):
        with pytest.raises(expected):
            write_run(
                Broken(made, error),
                made.plan,
                recipe="",
                record=RunRecord.of_plan(made.plan),
                source_directory=None,
                out=tmp_path / "run",
            )
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    message = (
        r"cannot write .*run: the disk is full \(No space left.*\); [\d,.]+ MB are free and more than that is needed"
    )
    with pytest.raises(UserError, match=message):
        save(small_fp8(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"not enough room on the disk; 0\.0 MB are free and about 1\.\d MB are needed.*make room"
    ):
        save(small_fp8(), tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "run.json": ("{", "cannot read .*run.json"),
    "layout.json": ('{"schema": "octavo.layout/9"}', "this octavo reads 'octavo.layout/1'"),
    "plan.json": ("[]", "not a plan that octavo wrote"),
    "quantized.safetensors": ("short", "cannot read quantized.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    save(small_fp8(), tmp_path / "run")
    text, message = DAMAGE[name]
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["plan.json", "recipe.yaml", "layout.json", "quantized.safetensors"])
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    save(small_fp8(), tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match=name.split(".")[0]):
        read_run(tmp_path / "run")


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    save(small_fp8(), tmp_path / "run", max_shard_bytes=300)
    sorted((tmp_path / "run").glob("*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match=r"3 quantized safetensors files belong here, there are .*00002-of-00003"):
        read_run(tmp_path / "run")


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no run.json"):
        read_run(tmp_path)


def test_a_tensor_that_does_not_fit_its_format(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "layer", (6, 128), "int8-channel")
    save(made, tmp_path / "run")
    found = read_run(tmp_path / "run")
    with ShardWriter(tmp_path / "run", stem="quantized") as writer:
        writer.add("layer.weight.codes", torch.zeros(2, 2, dtype=torch.uint8))
        writer.close()
    with pytest.raises(UserError, match=r"'layer.weight.codes' is torch.uint8 \(2, 2\), and its format says"):
        list(found.layers())
    with ShardWriter(tmp_path / "run", stem="quantized") as writer:
        writer.add("layer.weight.codes", torch.zeros(6, 128, dtype=torch.uint8))
        writer.close()
    with pytest.raises(UserError, match=r"tensor 'layer.weight.scale' is missing"):
        list(read_run(tmp_path / "run").layers())


def test_attention_only(tmp_path: Path) -> None:
    made = Handmade()
    add_attention(made, "attention", query="e4m3-tensor", key="int8-tensor-asymmetric")
    save(made, tmp_path / "run")
    assert same(list(read_run(tmp_path / "run").layers()), made.members)
