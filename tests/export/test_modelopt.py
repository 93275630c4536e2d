"""The ModelOpt layout: names, dtypes and shapes as ModelOpt 0.47 writes them; refusals before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.handmade import (
    Handmade,
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
from octavo.export.base import EXPORTERS, exporter
from octavo.export.modelopt_labels import LayerFormats, Rounded, layer_problem
from octavo.export.views import dequantized_weights
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.readers.compare import compare_weights
from octavo.spec.facts import Slot
from octavo.spec.formats import NVFP4, tensor_format
from octavo.spec.steps import make_step

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


F32, F8, U8 = "float32", "float8_e4m3fn", "uint8"
SCALAR: tuple[int, ...] = ()
# What ModelOpt 0.47 writes for a Linear of 128 x 256 (docs/formats/modelopt.md): formats of weight and inputs, label,
# weight, weight_scale, and weight_scale_2 and input_scale where they are.
TABLE: dict[str, tuple[Any, ...]] = {
    "fp8": ("e4m3-tensor", "e4m3-tensor", "FP8", (F8, (128, 256)), (F32, ()), None, SCALAR),
    "fp8-dynamic": (
        "e4m3-channel", "e4m3-token", "FP8_PER_CHANNEL_PER_TOKEN", (F8, (128, 256)), (F32, (128,)), None, None,
    ),
    "fp8-block": ("e4m3-tile128x128", "e4m3-group128", "FP8_PB_WO", (F8, (128, 256)), (F32, (1, 1, 2, 1)), None, None),
    "fp8-block, weights": ("e4m3-tile128x128", None, "FP8_PB_WO", (F8, (128, 256)), (F32, (1, 1, 2, 1)), None, None),
    "int8": ("int8-channel", "int8-tensor", "W8A8_SQ_PER_CHANNEL", ("int8", (128, 256)), (F32, (128,)), None, SCALAR),
    "int8-weight-only": ("int8-channel", None, "W8A16", ("int8", (128, 256)), (F32, (128,)), None, None),
    "int4-group": ("int4-group128", None, "W4A16_AWQ", (U8, (64, 256)), (F32, (128, 2)), None, None),
    "w4a8": ("int4-group128", "e4m3-tensor", "W4A8_AWQ", (U8, (64, 256)), (F32, (128, 2)), SCALAR, SCALAR),
    "nvfp4": ("nvfp4", "nvfp4", "NVFP4", (U8, (128, 128)), (F8, (128, 16)), SCALAR, SCALAR),
    "nvfp4-weight-only": ("nvfp4", None, "W4A16_NVFP4", (U8, (128, 128)), (F8, (128, 16)), SCALAR, None),
    "nvfp4-four-over-six": ("nvfp4-four-over-six", "nvfp4", "NVFP4", (U8, (128, 128)), (F8, (128, 16)), SCALAR, SCALAR),
    "w4a8-nvfp4": ("nvfp4-in-fp8", "e4m3-tensor", "W4A8_NVFP4_FP8", (U8, (128, 128)), (F8, (128, 16)), SCALAR, SCALAR),
    "mxfp4": ("mxfp4", "mxfp4", "MXFP4", (U8, (128, 128)), (U8, (128, 8)), None, None),
    "mxfp4-weight-only": ("mxfp4-ceil", None, "MXFP4", (U8, (128, 128)), (U8, (128, 8)), None, None),
    "w4a8-mxfp4": ("mxfp4", "e4m3-tensor", "W4A8_MXFP4_FP8", (U8, (128, 128)), (U8, (128, 8)), None, SCALAR),
    "mxfp8": ("mxfp8", "mxfp8", "MXFP8", (F8, (128, 256)), (U8, (128, 8)), None, None),
}  # fmt: skip
GROUPED = {"W4A16_AWQ": 128, "W4A8_AWQ": 128, "NVFP4": 16, "W4A16_NVFP4": 16, "W4A8_NVFP4_FP8": 16} | dict.fromkeys(
    ("MXFP4", "W4A8_MXFP4_FP8", "MXFP8"), 32
)


@pytest.mark.parametrize("recipe", TABLE)
def test_names_dtypes_shapes_and_label(recipe: str, tmp_path: Path) -> None:
    weight, inputs, label, codes, scale, second_scale, input_scale = TABLE[recipe]
    made = Handmade()
    is_dynamic = inputs is not None and input_scale is None
    add_layer(made, "model.up", (128, 256), weight, inputs, is_dynamic=is_dynamic)
    add_layer(made, "lm_head", (4, 256), None)
    out = write(made, tmp_path / "out", dtype=torch.bfloat16)
    expected = {"model.up.weight": codes, "model.up.weight_scale": scale, "lm_head.weight": ("bfloat16", (4, 256))}
    expected |= {"model.up.weight_scale_2": (F32, second_scale)} if second_scale is not None else {}
    expected |= {"model.up.input_scale": (F32, input_scale)} if input_scale is not None else {}
    assert tensors(out) == expected
    section = quantization(out)
    assert section["quant_algo"] == label
    assert section["kv_cache_quant_algo"] is None
    assert section["exclude_modules"] == ["lm_head"]
    assert section.get("group_size") == GROUPED.get(label)
    assert ("pre_quant_scale" in section) == label.endswith("_AWQ")


@pytest.mark.parametrize("recipe", TABLE)
def test_the_tensors_mean_what_the_table_says(recipe: str, tmp_path: Path) -> None:
    """Written out once more with torch alone, from the table: values, not only shapes."""
    weight, inputs, label, _, _, second_scale, input_scale = TABLE[recipe]
    made = Handmade()
    is_dynamic = inputs is not None and input_scale is None
    add_layer(made, "up", (128, 256), weight, inputs, is_dynamic=is_dynamic)
    found = load_file(write(made, tmp_path / "out") / "model.safetensors")
    codes, scale = found["up.weight"], found["up.weight_scale"]
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    if label in ("W4A16_AWQ", "W4A8_AWQ"):
        nibbles = torch.stack([codes & 15, codes >> 4], 1).reshape(128, 256).to(torch.int8)
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    elif codes.dtype == torch.uint8:
        nibbles = torch.stack([codes & 15, codes >> 4], 2).reshape(128, 256).int()
        values = e2m1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    else:
        values = codes.float()
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if second_scale is not None and label != "W4A8_AWQ":
        scale = scale * found["up.weight_scale_2"]
    if label == "FP8_PB_WO":
        scale = scale.reshape(1, 2).repeat_interleave(128, 0)
    if scale.ndim == 2:
        scale = scale.repeat_interleave(256 // scale.shape[1], 1)
    expected = dict(dequantized_weights(made))["up.weight"]
    assert torch.equal(values * (scale[:, None] if scale.ndim == 1 else scale), expected)
    if label == "W4A8_AWQ":
        assert torch.equal(found["up.weight_scale_2"], expected.abs().amax() / 448)
    if label == "W4A8_NVFP4_FP8":
        assert found["up.weight_scale"].float().max() <= 448 / 6


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
    add_layer(made, "fp4", (128, 6), "nvfp4", is_transposed=True)
    add_layer(made, "mx", (8, 16, 2, 4), "mxfp8", "mxfp8", operation="conv", is_dynamic=True)
    found = tensors(write(made, tmp_path / "out"))
    assert {name: shape for name, (_, shape) in found.items()} == {
        "conv.weight": (4, 3, 2, 2), "conv.weight_scale": (4,),
        "up.weight": (6, 4, 2, 2), "up.weight_scale": (1, 4, 1, 1),
        "gpt.weight": (128, 6), "gpt.weight_scale": (1, 6),
        "words.weight": (10, 4), "words.weight_scale": (10,),
        "gpt4.weight": (128, 3), "gpt4.weight_scale": (2, 6),
        "fp4.weight": (64, 6), "fp4.weight_scale": (8, 6), "fp4.weight_scale_2": (),
        "mx.weight": (8, 16, 2, 4), "mx.weight_scale": (8, 4),
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
    "E5M2": (("e5m2-tensor", "e4m3-tensor"), r"no label for e5m2 per tensor weights"),
    "double quantization": (
        ("int4-group64-double-quant",),
        r"no label for int4 groups of 64, scales uint8 per channel",
    ),
    "MXFP8 without inputs": (("mxfp8",), r"no label for e4m3 groups of 32, .* with unquantized inputs"),
    "NVFP4 found per call": ((NVFP4, "nvfp4", True), r"with dynamic e2m1 groups of 16"),
    "NVFP4 for FP8 kernels": ((NVFP4, "e4m3-tensor"), r"no label .*weights in 'nvfp4-in-fp8' fit\)"),
    "four over six inputs": ((NVFP4, "nvfp4-four-over-six"), r"with static e2m1 groups of 16, four-over-six"),
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


def test_shapes_that_do_not_fit_are_refused() -> None:
    made = Handmade()
    add_layer(made, "tall", (130, 128), "e4m3-tile128x128")
    add_layer(made, "conv", (4, 16, 2, 4), "nvfp4", operation="conv")
    add_layer(
        made, "up", (16, 4, 2, 4), "mxfp8", "mxfp8", operation="conv_transposed", is_transposed=True, is_dynamic=True
    )
    problems = MODELOPT.problems(made.plan)
    for problem, message in zip(
        problems,
        ("whole tiles of 128x128, and the weight is 130x128", "no such order for a conv", "blocks of a trans"),
        strict=True,
    ):
        assert message in problem


def test_an_input_whose_scale_no_reader_would_find_is_refused() -> None:
    """``F.linear(x, self.scale_me)`` in ``mixer`` is the site ``mixer#linear0``; its weight is called otherwise."""
    e4m3 = Rounded(tensor_format("e4m3-tensor"))
    both = {Slot.WEIGHT: e4m3, Slot.INPUT: e4m3}
    for site, weight in (("mixer", "mixer.weight"), ("mixer.in_proj", "mixer.in_proj_weight"), ("(model)", "weight")):
        assert layer_problem(LayerFormats(site, "linear", (8, 8), both, weight_name=weight)) is None
    problem = layer_problem(LayerFormats("mixer#linear0", "linear", (8, 8), both, weight_name="mixer.scale_me"))
    assert problem is not None
    assert "'mixer.scale_me'" in problem


def with_cache(fmt: str) -> Handmade:
    made = small_fp8()
    add_attention(made, "blocks.0.attention.self", key_cache=fmt, value_cache=fmt)
    return made


@pytest.mark.parametrize(("fmt", "algorithm", "factor"), [("e4m3-tensor", "FP8", 1), ("nvfp4", "NVFP4", 6)])
def test_scales_of_the_cache(fmt: str, algorithm: str, factor: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    made = with_cache(fmt)
    out = write(made, tmp_path / "out", source)
    found = load_file(out / "model.safetensors")
    for name in ("k_proj.k_scale", "v_proj.v_scale"):
        assert found[f"blocks.0.attention.self.{name}"].item() == 0.03125 * factor  # amax / 448 in both
    assert quantization(out)["kv_cache_quant_algo"] == algorithm
    assert "kv_cache_scheme" in json.loads((out / "config.json").read_text())["quantization_config"]
    comparison = compare_weights(
        out, ((n, v.numpy()) for n, v in dequantized_weights(made)), activations=activation_scales(made)
    )
    assert comparison.agrees, comparison
    assert comparison.num_activations == 6


def test_caches_of_two_formats_or_of_some_layers_only_are_refused() -> None:
    made = with_cache("e4m3-tensor")
    add_attention(made, "other", key_cache="nvfp4", value_cache="nvfp4")
    (problem,) = MODELOPT.problems(made.plan)
    assert "'other': the layout has one format for all caches, and 'blocks.0.attention.self' has another" in problem
    made = small_fp8()
    add_attention(made, "half", key_cache="e4m3-tensor")
    site = dataclasses.replace(made.decisions[-1].site, slots=(Slot.KEY_CACHE, Slot.VALUE_CACHE))
    made.decisions[-1] = dataclasses.replace(made.decisions[-1], site=site)
    (problem,) = MODELOPT.problems(made.plan)
    assert "engines quantize all caches or none, and 'half.v_cache_quantizer' stays as it is" in problem


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
        ("key_cache", "int8-tensor", "caches in E4M3 with one static scale or in NVFP4, not static int8 per tensor"),
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


EXTRAS: dict[str, tuple[Any, ...]] = {
    "int4-awq": ("int4-group128", None, ("pre_scale",), "W4A16_AWQ"),
    "w4a8-awq": ("int4-group128", "e4m3-tensor", ("pre_scale",), "W4A8_AWQ"),
    "int8-smoothquant": ("int8-channel", "int8-tensor", ("pre_scale",), "W8A8_SQ_PER_CHANNEL"),
    "nvfp4-awq": ("nvfp4", "nvfp4", ("pre_scale",), "NVFP4_AWQ"),
    "nvfp4-svdquant": ("nvfp4", "nvfp4", ("pre_scale", "low_rank"), "NVFP4_SVD"),
    "nvfp4-svdquant, folded": ("nvfp4", "nvfp4", ("low_rank",), "NVFP4_SVD"),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_what_algorithms_leave_beside_a_layer(case: str, tmp_path: Path) -> None:
    weight, inputs, parts, label = EXTRAS[case]
    made = Handmade()
    add_layer(made, "up", (4, 128), weight, inputs)
    extras = {part: value for part, value in some_extras(4, 128).items() if part in parts}
    add_extras(made, **extras)
    out = write(made, tmp_path / "out")
    found, section = load_file(out / "model.safetensors"), quantization(out)
    assert section["quant_algo"] == label
    assert section.get("pre_quant_scale") == (None if label.startswith("W8") else True)
    multiplied = 1 / extras["pre_scale"] if "pre_scale" in parts else torch.ones(128)
    assert torch.equal(found["up.pre_quant_scale"], multiplied)
    if "low_rank" in parts:
        assert section["lora_rank"] == 2
        assert torch.equal(found["up.svdquant_lora_a"], extras["low_rank"][0])
        assert torch.equal(found["up.svdquant_lora_b"], extras["low_rank"][1])
    expected = [(name, value.numpy()) for name, value in dequantized_weights(made)]
    found_all = compare_weights(out, expected, tensors=(), extras=expected_extras(made))
    assert found_all.agrees, found_all
    assert found_all.num_tensors == {"pre_scale": 1, "low_rank": 2}[parts[0]] + 2 * (len(parts) - 1)
    narrow = write(made, tmp_path / "narrow", dtype=torch.bfloat16)
    assert load_file(narrow / "model.safetensors")["up.pre_quant_scale"].dtype == torch.bfloat16
    assert compare_weights(narrow, expected, extras=expected_extras(made)).agrees
    made.members[-1] = dataclasses.replace(made.members[-1], pre_scale=torch.full((128,), 3.0))
    differs = compare_weights(out, expected, extras=expected_extras(made))
    assert "up.pre_scale" in {*differs.missing, *(difference.name for difference in differs.differences)} or not parts


def test_extras_without_a_place_are_never_dropped_in_silence(tmp_path: Path) -> None:
    extras = some_extras(4, 128)
    for fmt, inputs, left, message in (
        ("e4m3-tensor", "e4m3-tensor", {"pre_scale": extras["pre_scale"]}, "no pre_quant_scale under FP8"),
        ("nvfp4", None, {"pre_scale": extras["pre_scale"]}, "no pre_quant_scale under W4A16_NVFP4"),
        (
            "int4-group128",
            None,
            {"low_rank": extras["low_rank"]},
            "low-rank branch beside NVFP4 weights and inputs only",
        ),
        ("nvfp4", "nvfp4", {"input_rotation": 16}, "no place for the rotation of its input"),
    ):
        made = Handmade()
        add_layer(made, "up", (4, 128), fmt, inputs)
        add_extras(made, **left)
        with pytest.raises(UserError, match=message):
            write(made, tmp_path / "out")
    made = small_fp8()
    add_attention(made, "smooth", query="e4m3-tensor")
    add_extras(made, pre_scale=matrix(4))
    with pytest.raises(UserError, match="'smooth': the layout scales the inputs of quantized weights only"):
        write(made, tmp_path / "out")


@pytest.mark.parametrize(
    ("step", "weight", "inputs", "problem"),
    [
        ("rotate", "nvfp4", "nvfp4", "step 'rotate': the layout has no place for the rotation of its input"),
        ("svdquant", "int4-group128", None, "step 'svdquant': the layout has a low-rank branch beside NVFP4 weights"),
        ("svdquant", "nvfp4", "nvfp4", ""),
        ("smoothquant", "e4m3-tensor", "e4m3-tensor", ""),  # it may be folded
    ],
)
def test_what_steps_leave_for_sure_is_refused_before_any_work(
    step: str, weight: str, inputs: str, problem: str
) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), weight, inputs)
    add_layer(made, "other", (4, 128), weight, inputs)
    found = MODELOPT.step_problems(made.plan, {make_step(step): frozenset({"up"})})
    assert len(found) == bool(problem)
    assert all(text.startswith(f"layer 'up': {problem}") for text in found)


def test_group_scales_that_overflow_in_fp8_stop_the_export(tmp_path: Path) -> None:
    made = Handmade()
    add_layer(made, "up", (4, 128), "nvfp4-in-fp8", "e4m3-tensor")
    weight = made.members[0].weight
    assert weight is not None
    assert isinstance(weight.scale, QTensor)
    weight.scale.codes[0, 0] = 0x6A  # 80, and 72 is the largest E4M3 below 448 / 6
    with pytest.raises(
        UserError, match=r"'up': kernels unpack its weights to FP8, where the group scale 80 times 6 exc"
    ):
        write(made, tmp_path / "out")


def test_an_unknown_layout_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown layout 'model_opt': did you mean 'modelopt'\? layouts are modelopt"):
        exporter("model_opt", EXPORTERS)
    with pytest.raises(UserError, match=r"unknown layout 'zzz': layouts are "):
        exporter("zzz", EXPORTERS)
