"""Files that lie: each lie ends in a sentence, none in a traceback or a read outside the directory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from export.handmade import Handmade, add_layer, small_fp8
from octavo.errors import UserError
from octavo.export.base import EXPORTERS
from octavo.export.run import write_run
from octavo.export.shards import ShardWriter
from octavo.readers.inspect import inspect
from octavo.readers.opening import open_checkpoint
from octavo.readers.tensor_files import open_tensors, read_header
from octavo.spec.records import RunRecord


def file_with(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "not JSON": (b"{", "header is not valid JSON"),
    "deep": (b"[" * 100_000, "header is not valid JSON"),
    "a list": ([], "header is not an object"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, "'a' has no valid dtype, shape and data_offsets"),
    "a number": ({"a": 3}, "'a' has no valid dtype, shape and data_offsets"),
    "negative": ({"a": tensor(shape=[-4])}, "'a' has no valid dtype, shape and data_offsets"),
    "a bool": ({"a": tensor(shape=[True])}, "'a' has no valid dtype, shape and data_offsets"),
    "text": ({"a": tensor(shape="44")}, "'a' has no valid dtype, shape and data_offsets"),
    "dtype": ({"a": tensor(dtype="Q3")}, "dtype 'Q3', which this version cannot read"),
    "dtype list": ({"a": tensor(dtype=[])}, "'a' has no valid dtype|cannot read"),
    "too short": ({"a": tensor(shape=[5])}, r"'a' is U8 \(5,\), 5 bytes, but 4 are set aside"),
    "huge": ({"a": tensor(shape=[1 << 62, 1 << 62])}, "but 4 are set aside"),
    "outside": ({"a": tensor(shape=[9], offsets=[0, 9])}, "describes .* bytes and the file has"),
    "a gap": ({"a": tensor(shape=[2], offsets=[2, 4])}, "overlaps its neighbour or leaves a gap"),
    "overlap": ({"a": tensor(), "b": tensor()}, "overlaps its neighbour or leaves a gap"),
    "left over": ({"a": tensor(shape=[2], offsets=[0, 2])}, "describes .* bytes and the file has"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    header, message = LIES[lie]
    with pytest.raises(UserError, match=message):
        read_header(file_with(tmp_path / "model.safetensors", header, b"\0" * 4))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, struct.pack("<Q", 1 << 60) + b"{}"])
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_flipped_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    if not (tmp_path / "good").exists():
        file_with(tmp_path / "good", {"a": tensor(), "b": tensor(dtype="F32", shape=[1], offsets=[4, 8])}, b"\0" * 8)
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        for entry in read_header(path)[0].values():
            entry.read()
    except UserError:
        pass


INDICES = {
    "parent": ({"weight_map": {"a": "../outside.safetensors"}}, r"'\.\./outside\.safetensors' is not the name of a"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not the name of a safetensors file"),
    "other file": ({"weight_map": {"a": "config.json"}}, "'config.json' is not the name of a safetensors file"),
    "a number": ({"weight_map": {"a": 3}}, "3 is not the name of a safetensors file beside the index"),
    "no map": ({"metadata": {}}, "no weight_map"),
    "missing": ({"weight_map": {"a": "model-2.safetensors"}}, "model-2.safetensors is missing, and .* names it"),
    "not inside": ({"weight_map": {"b": "model-1.safetensors"}}, "tensor 'b' is not in model-1.safetensors"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_lies(case: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for path in (tmp_path / "outside.safetensors", inside / "model-1.safetensors"):
        file_with(path, {"a": tensor()}, b"\0" * 4)
    index, message = INDICES[case]
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_tensors(inside, "model")


def test_a_file_that_shrinks_between_header_and_data(tmp_path: Path) -> None:
    path = file_with(tmp_path / "model.safetensors", {"a": tensor()}, b"\0" * 4)
    entry = read_header(path)[0]["a"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="tensor 'a' is cut short"):
        entry.read()
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors: No such file"):
        entry.read()


def run_of(made: Handmade, out: Path) -> Path:
    write_run(made, made.plan, recipe="", record=RunRecord.of_plan(made.plan), source_directory=None, out=out)
    return out


def modelopt_of(made: Handmade, out: Path) -> Path:
    return EXPORTERS["modelopt"].write(made, made.plan, source_directory=None, out=out, float_dtype=None)


LAYOUT_LIES = {
    "schema": (lambda d: d.update(schema="x"), "schema 'x', this reader knows 'octavo.layout/1'"),
    "no layers": (lambda d: d.pop("layers"), "layout.json is damaged .KeyError"),
    "layers": (lambda d: d.update(layers=3), "layout.json is damaged .TypeError"),
    "a layer": (lambda d: d["layers"].append(3), "layout.json is damaged .TypeError"),
    "no key": (lambda d: d["layers"][0]["weight"].pop("key"), "layout.json is damaged .KeyError"),
    "other key": (lambda d: d["layers"][0]["weight"].update(key="x"), r"tensor 'x\.scale' is missing from the files"),
    "shape": (lambda d: d["layers"][0]["weight"].update(shape=["a"]), "layout.json is damaged .ValueError"),
    "sizes": (lambda d: d["layers"][0]["weight"].update(shape=[3, 3]), "cannot be a parameter of"),
    "slot": (lambda d: d["layers"][0]["activations"].update(x={}), "layout.json is damaged .KeyError"),
    "element": (
        lambda d: d["layers"][0]["weight"]["format"].update(element="e9m9"),
        r"weight 'blocks\.0\.up\.weight': unknown element format 'e9m9'",
    ),
    "granularity": (
        lambda d: d["layers"][0]["weight"]["format"].update(granularity={"kind": "channel", "axis": -2}),
        r"weight 'blocks\.0\.up\.weight': float32 \(\) where fp32 \(8,\) was expected",
    ),
}


def read_all(path: Path) -> None:
    for weight in open_checkpoint(path).weights.values():
        weight.dequantize()


@pytest.mark.parametrize("lie", LAYOUT_LIES)
def test_a_run_that_lies(lie: str, tmp_path: Path) -> None:
    run = run_of(small_fp8(), tmp_path / "run")
    change, message = LAYOUT_LIES[lie]
    layout = json.loads((run / "layout.json").read_text())
    change(layout)  # type: ignore[no-untyped-call]
    (run / "layout.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=message):
        read_all(run)


@pytest.mark.parametrize("name", ["layout.json", "quantized.safetensors"])
def test_a_run_without_a_part(name: str, tmp_path: Path) -> None:
    run = run_of(small_fp8(), tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_checkpoint(run)


def rewritten(out: Path, **changes: object) -> Path:
    """``model.safetensors`` with some tensors replaced or (``None``) dropped."""

    found = {
        **load_file(out / "model.safetensors"),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    with ShardWriter(out, always_index=True) as writer:
        for name, value in found.items():
            if value is not None:
                writer.add(name, value)  # type: ignore[arg-type]
        writer.close()
    return out


def test_a_modelopt_weight_without_its_scale(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 8), "int8-channel")
    out = rewritten(modelopt_of(made, tmp_path / "out"), up__weight_scale=None)
    with pytest.raises(UserError, match=r"weight 'up\.weight' is I8 and has no up\.weight_scale beside it"):
        open_checkpoint(out)


def test_modelopt_scales_that_do_not_fit(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 8), "int8-channel")
    out = modelopt_of(made, tmp_path / "out")
    for scale, message in (
        (torch.ones(3), r"scales F32 of shape \(3,\) do not fit codes I8 of shape \(4, 8\)"),
        (torch.ones(2, 8), r"scales F32 of shape \(2, 8\) do not fit"),
        (torch.ones(4, dtype=torch.float16), r"scale 'up\.weight_scale' is F16; F32 was expected"),
    ):
        weight = open_checkpoint(rewritten(out, up__weight_scale=scale)).weights["up.weight"]
        with pytest.raises(UserError, match=message):
            weight.dequantize()


def test_a_modelopt_format_this_version_does_not_read_is_listed_all_the_same(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), "nvfp4")
    out = relabelled(modelopt_of(made, tmp_path / "out"), "NVFP4_NEXT")
    weight = open_checkpoint(out).weights["up.weight"]
    assert weight.format == "NVFP4_NEXT"
    assert set(weight.scales) == {"weight_scale", "weight_scale_2"}
    with pytest.raises(UserError, match=r"'up\.weight': scales .* NVFP4_NEXT is not read by this version"):
        weight.dequantize()
    assert inspect(out).counts[0].format == "NVFP4_NEXT"


def relabelled(out: Path, label: str) -> Path:
    config = json.loads((out / "hf_quant_config.json").read_text())
    config["quantization"]["quant_algo"] = label
    (out / "hf_quant_config.json").write_text(json.dumps(config))
    return out


E4M3, TWO_HALVES = torch.float8_e4m3fn, torch.full((2,), 0.5)
DAMAGED_BLOCKS: dict[str, tuple[str, dict[str, torch.Tensor | None], str]] = {
    "one scale too few": ("nvfp4", {"weight_scale": torch.ones(3, 16).to(E4M3)}, r"\(out_features, groups\) was exp"),
    "groups that do not divide": ("nvfp4", {"weight_scale": torch.ones(4, 7).to(E4M3)}, r"\(out_features, groups\)"),
    "no axis": ("nvfp4", {"weight": torch.tensor(1, dtype=torch.uint8)}, "two axes were expected"),
    "one axis": ("nvfp4", {"weight": torch.ones(512, dtype=torch.uint8)}, r"\(out_features, groups\) was expected"),
    "no scales": ("nvfp4", {"weight_scale": torch.ones(4, 0).to(E4M3)}, r"\(out_features, groups\) was expected"),
    "another dtype": ("nvfp4", {"weight_scale": torch.ones(4, 16)}, "is F32; F8_E4M3 was expected"),
    "no second scale": ("nvfp4", {"weight_scale_2": None}, "has a weight_scale_2 beside it, and there is none"),
    "two second scales": ("nvfp4", {"weight_scale_2": TWO_HALVES}, r"is F32 \(2,\); one F32 was expected"),
    "a second scale of integers": ("nvfp4", {"weight_scale_2": torch.tensor(1)}, r"is I64 \(\); one F32 was expected"),
    "mx, another dtype": ("mxfp4", {"weight_scale": torch.ones(4, 8).to(E4M3)}, "is F8_E4M3; U8 was expected"),
    "mx, another shape": ("mxfp4", {"weight_scale": torch.ones(4, 8, 1, dtype=torch.uint8)}, r"\(out_features, groups"),
    "tiles": ("e4m3-tile128x128", {"weight_scale": torch.ones(2, 1, 1, 1)}, r"\(1, 1, 2, 1\) was expected"),
    "int4, another dtype": ("int4-group64", {"weight_scale": torch.ones(4, 4).to(E4M3)}, "is F8_E4M3; F32 was exp"),
    "int4, another shape": ("int4-group64", {"weight_scale": torch.ones(3, 4)}, r"do not fit scales of shape \(3, 4\)"),
}


@pytest.mark.parametrize("case", DAMAGED_BLOCKS)
def test_modelopt_blocks_that_do_not_fit(case: str, tmp_path: Path) -> None:
    fmt, changes, message = DAMAGED_BLOCKS[case]
    made = Handmade()
    add_layer(made, "up", (128 if "tile" in fmt else 4, 256), fmt)
    out = rewritten(modelopt_of(made, tmp_path / "out"), **{f"up__{part}": value for part, value in changes.items()})
    inspect(out)
    with pytest.raises(UserError, match=message):
        open_checkpoint(out).weights["up.weight"].dequantize()


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_modelopt_blocks_of_any_shape_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 40), max_size=4)
    dtypes = st.sampled_from([torch.uint8, torch.float32, E4M3, torch.int8])
    label = data.draw(st.sampled_from(["NVFP4", "MXFP4", "MXFP8", "FP8_PB_WO", "W4A8_AWQ", "FP8", "else"]))
    out = tmp_path / "out"
    if not out.exists():
        modelopt_of(small_fp8(), out)
    relabelled(out, label)
    with ShardWriter(out, always_index=True) as writer:
        codes = st.sampled_from([torch.uint8, E4M3, torch.int8])
        writer.add("up.weight", torch.ones(data.draw(shapes)).to(data.draw(codes)))
        for part in ("weight_scale", "weight_scale_2"):
            writer.add(f"up.{part}", torch.ones(data.draw(shapes)).to(data.draw(dtypes)))
        writer.close()
    weight = open_checkpoint(out).weights["up.weight"]
    try:
        values = weight.dequantize()
    except UserError:
        return
    assert values.shape == weight.shape


@pytest.mark.parametrize("text", ["{}", '{"quantization": 3}', '{"quantization": {}}'])
def test_a_modelopt_config_without_an_algorithm(text: str, tmp_path: Path) -> None:
    out = modelopt_of(small_fp8(), tmp_path / "out")
    (out / "hf_quant_config.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a ModelOpt checkpoint: no quant_algo in hf_quant_config.json"):
        open_checkpoint(out)


def test_attention_scales_with_other_names(tmp_path: Path) -> None:
    out = modelopt_of(small_fp8(), tmp_path / "out")
    header = {"attention.quarry_scale": tensor(dtype="F32", shape=[])}
    file_with(out / "octavo_activations.safetensors", header, b"\0" * 4)
    with pytest.raises(UserError, match=r"'attention\.quarry_scale' is none of <attention>\.{query,"):
        open_checkpoint(out)


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give the directory of a run or of a checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give the directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(
        UserError, match=r'no run\.json, no hf_quant_config\.json and no model\.safetensors; there is "file"'
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the directory is empty"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path / "empty")
