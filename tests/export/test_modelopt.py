"""The ModelOpt layout: names, dtypes and shapes as ModelOpt 0.47 writes them; refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.handmade import Handmade, activation, add_attention, add_layer, matrix, small_fp8
from octavo.errors import UserError
from octavo.export.base import EXPORTERS, exporter
from octavo.export.views import dequantized_weights
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.spec.facts import Slot
from octavo.spec.formats import NVFP4, tensor_format

MODELOPT = EXPORTERS["modelopt"]


def write(made: Handmade, out: Path, source: Path | None = None, dtype: torch.dtype | None = None) -> Path:
    return MODELOPT.write(made, made.plan, source_directory=source, out=out, float_dtype=dtype)


def tensors(out: Path, file: str = "model.safetensors") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape."""
    found = load_file(out / file)
    return {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in found.items()}


def quantization(out: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    return section


# What ModelOpt 0.47 writes for a Linear of 4 x 256 (docs/formats/modelopt.md): weight, scale, input scale, label.
TABLE = {
    "fp8": ("e4m3-tensor", "e4m3-tensor", False, ("float8_e4m3fn", (4, 256)), ("float32", ()), True, "FP8"),
    "fp8-dynamic": (
        "e4m3-channel", "e4m3-token", True,
        ("float8_e4m3fn", (4, 256)), ("float32", (4,)), False, "FP8_PER_CHANNEL_PER_TOKEN",
    ),
    "int8": ("int8-channel", "int8-tensor", False, ("int8", (4, 256)), ("float32", (4,)), True, "W8A8_SQ_PER_CHANNEL"),
    "int8-weight-only": ("int8-channel", None, False, ("int8", (4, 256)), ("float32", (4,)), False, "W8A16"),
    "int4-group": ("int4-group128", None, False, ("uint8", (2, 256)), ("float32", (4, 2)), False, "W4A16_AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", TABLE)
def test_names_dtypes_shapes_and_label(recipe: str, tmp_path: Path) -> None:
    weight, inputs, is_dynamic, codes, scale, has_input_scale, label = TABLE[recipe]
    made = Handmade()
    add_layer(made, "model.up", (4, 256), weight, inputs, is_dynamic=is_dynamic)
    add_layer(made, "lm_head", (4, 256), None)
    out = write(made, tmp_path / "out", dtype=torch.bfloat16)
    expected = {
        "model.up.weight": codes,
        "model.up.weight_scale": scale,
        "lm_head.weight": ("bfloat16", (4, 256)),
        **({"model.up.input_scale": ("float32", ())} if has_input_scale else {}),
    }
    assert tensors(out) == expected
    section = quantization(out)
    assert section["quant_algo"] == label
    assert section["kv_cache_quant_algo"] is None
    assert section["exclude_modules"] == ["lm_head"]
    group = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": False}
    assert {name: section.get(name) for name in group} == (group if label == "W4A16_AWQ" else dict.fromkeys(group))


def test_int4_rows_lie_two_to_a_byte_the_even_one_low(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), "int4-group128")
    packed = load_file(write(made, tmp_path / "out") / "model.safetensors")["up.weight"]
    weight = made.members[0].weight
    assert weight is not None
    assert torch.equal(packed & 15, weight.codes[0::2].view(torch.uint8) & 15)
    assert torch.equal(packed >> 4, weight.codes[1::2].view(torch.uint8) & 15)


def test_input_scales_and_weights_are_those_of_the_snapshot(tmp_path: Path) -> None:
    made = small_fp8()
    found = load_file(write(made, tmp_path / "out") / "model.safetensors")
    assert found["blocks.0.up.input_scale"].item() == 0.03125
    for name, value in dequantized_weights(made):
        assert torch.equal(found[name].float() * found[f"{name}_scale"], value)


def test_what_stays_is_in_the_models_dtype_and_integers_are_left_alone(tmp_path: Path) -> None:
    made = small_fp8()
    cast, kept = (write(made, tmp_path / str(dtype), dtype=dtype) for dtype in (torch.bfloat16, None))
    assert tensors(cast)["norm.weight"] == ("bfloat16", (16,))
    assert tensors(cast)["positions"] == ("int64", (5,))
    assert tensors(kept)["norm.weight"] == ("float32", (16,))


def test_attention_scales_lie_beside_the_index(tmp_path: Path) -> None:
    out = write(small_fp8(), tmp_path / "out")
    scale = ("float32", ())
    names = {"blocks.0.attention.query_scale": scale, "blocks.0.attention.softmax_scale": scale}
    assert tensors(out, "octavo_activations.safetensors") == names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert not (set(names) & set(index["weight_map"]))


def test_layers_that_differ_are_listed(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "a", (4, 128), "e4m3-tensor", "e4m3-tensor")
    add_layer(made, "b", (4, 128), "int4-group64")
    add_layer(made, "c", (4, 128), None)
    out = write(made, tmp_path / "out")
    section = quantization(out)
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert section["quantized_layers"] == {
        "a": {"quant_algo": "FP8"},
        "b": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": False},
    }
    assert section["exclude_modules"] == ["c"]


def test_the_models_config_says_so_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (source / "tokenizer.json").write_text("{}")
    config = json.loads((write(small_fp8(), tmp_path / "out", source, torch.bfloat16) / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    section = config["quantization_config"]
    assert (section["quant_method"], section["quant_algo"], section["ignore"]) == ("modelopt", "FP8", ["head"])
    assert section["config_groups"]["group_0"] == {
        "weights": {"num_bits": 8, "type": "float", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": False},
        "targets": ["Linear"],
    }
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_readers_find_the_layouts_name_and_we_find_our_own(tmp_path: Path) -> None:
    out = write(small_fp8(), tmp_path / "out")
    producer = json.loads((out / "hf_quant_config.json").read_text())["producer"]
    assert producer["name"] == "modelopt"
    assert producer["written_by"].startswith("octavo ")
    write(small_fp8(), out)
    producer.pop("written_by")
    (out / "hf_quant_config.json").write_text(json.dumps({"producer": producer, "quantization": {}}))
    with pytest.raises(UserError, match=r"cannot write a modelopt checkpoint to .*: the directory holds something"):
        write(small_fp8(), out)


def test_tied_names_are_left_out(tmp_path: Path) -> None:
    made = small_fp8()
    made.aliases["lm_head.weight"] = "head.weight"
    assert "lm_head.weight" not in tensors(write(made, tmp_path / "out"))


def test_weights_keep_their_own_shape(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "conv", (4, 3, 2, 2), "int8-channel", operation="conv")
    add_layer(made, "up", (6, 4, 2, 2), "int8-channel", operation="conv_transposed", is_transposed=True)
    add_layer(made, "gpt", (128, 6), "int8-channel", is_transposed=True)
    add_layer(made, "words", (10, 4), "int8-channel", operation="embedding")
    add_layer(made, "gpt4", (128, 6), "int4-group64", is_transposed=True)
    found = tensors(write(made, tmp_path / "out"))
    assert {name: shape for name, (_, shape) in found.items()} == {
        "conv.weight": (4, 3, 2, 2), "conv.weight_scale": (4,),
        "up.weight": (6, 4, 2, 2), "up.weight_scale": (1, 4, 1, 1),
        "gpt.weight": (128, 6), "gpt.weight_scale": (1, 6),
        "words.weight": (10, 4), "words.weight_scale": (10,),
        "gpt4.weight": (128, 3), "gpt4.weight_scale": (2, 6),
    }  # fmt: skip


REFUSED = {
    "asymmetric": (("int8-channel-asymmetric",), r"no label for int8 per channel, asymmetric weights"),
    "int8 groups": (("int8-group128",), r"no label for int8 groups of 128 weights with unquantized inputs"),
    "int8 dynamic": (("int8-channel", "int8-token", True), r"with dynamic int8 per token inputs"),
    "FP8 without inputs": (("e4m3-tensor",), r"no label for e4m3 per tensor weights with unquantized inputs"),
    "asymmetric inputs": (
        ("int8-channel", "int8-tensor-asymmetric"),
        r"static int8 per tensor, asymmetric inputs",
    ),
    "NVFP4": ((NVFP4,), r"no label for e2m1 groups of 16, scales"),
    "lone inputs": ((None, "e4m3-tensor"), r"no place for a quantized input of an unquantized weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_hold_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    (weight, *rest), message = REFUSED[case]
    made = Handmade()
    add_layer(made, "fine", (4, 128), "int8-channel")
    add_layer(made, "odd.one", (4, 128), weight, rest[0] if rest else None, is_dynamic=len(rest) > 1)
    (problem,) = MODELOPT.problems(made.plan)
    assert problem.startswith("layer 'odd.one': the layout has no ")
    assert problem.endswith(
        "the run directory holds every format; for this layout choose another recipe or leave the layer out"
    )
    with pytest.raises(UserError, match=f"layout 'modelopt' cannot hold layer 'odd.one': .*{message}"):
        write(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_odd_number_of_rows_does_not_pack(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (5, 128), "int4-group128")
    assert "packs two rows into a byte, and out_features=5 is odd" in MODELOPT.problems(made.plan)[0]


def test_groups_of_a_transposed_convolution_are_refused() -> None:
    made = Handmade()
    add_layer(made, "up", (16, 4, 2, 4), "int4-group128", operation="conv_transposed", is_transposed=True)
    assert len(MODELOPT.problems(made.plan)) == 1


@pytest.mark.parametrize(
    ("slot", "fmt", "message"),
    [
        ("output", "int8-tensor", "no place for output_quantizer"),
        ("key_cache", "e4m3-tensor", "no place for k_cache_quantizer"),
        ("query", "e4m3-token", "keeps one symmetric static scale for q_bmm_quantizer, not static e4m3 per token"),
        ("key", "int8-tensor-asymmetric", "not static int8 per tensor, asymmetric"),
    ],
)
def test_other_quantizers_have_no_place(slot: str, fmt: str, message: str) -> None:
    made = small_fp8()
    add_attention(made, "attention", **{slot: fmt})
    (problem,) = MODELOPT.problems(made.plan)
    assert message in problem


def test_a_plan_without_weights_is_refused() -> None:
    made = Handmade()
    add_attention(made, "attention", query="e4m3-tensor")
    assert MODELOPT.problems(made.plan) == ["no layer of the plan has a quantized weight, so there is nothing to write"]


def test_a_static_quantizer_without_data_stops_the_export(tmp_path: Path) -> None:
    made = small_fp8()
    first = made.members[0]
    empty = {Slot.INPUT: ActivationScale(tensor_format("e4m3-tensor"), False)}
    made.members[0] = LayerSnapshot(
        first.name, "linear", first.weight_name, first.weight, first.weight_shape, activations=empty
    )
    with pytest.raises(UserError, match=r"layer 'blocks.0.up': the input quantizer is static and has no scale.*data"):
        write(made, tmp_path / "out")


def test_a_pre_scale_is_never_dropped_in_silence(tmp_path: Path) -> None:
    made = small_fp8()
    made.members.append(
        LayerSnapshot("smooth", "linear", activations={Slot.QUERY: activation("e4m3-tensor")}, pre_scale=matrix(4))
    )
    with pytest.raises(UserError, match="'smooth': its pre_quant_scale is not written by this version"):
        write(made, tmp_path / "out")


def test_an_unknown_layout_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown layout 'model_opt': did you mean 'modelopt'\? layouts are modelopt"):
        exporter("model_opt")
    with pytest.raises(UserError, match=r"unknown layout 'zzz': layouts are "):
        exporter("zzz")
