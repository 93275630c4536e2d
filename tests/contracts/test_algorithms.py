"""The battery that every algorithm passes. A new entry of ``ALGORITHMS`` is picked up by itself."""

from typing import Any

import pytest
import torch

import octavo
from contracts.tensor_block import WIDTH, TensorBlock
from octavo.algorithms.base import ALGORITHMS, make_algorithms
from octavo.errors import UserError
from octavo.numerics.qtensor import QTensor, fake_quantize
from octavo.numerics.statistics import Need
from octavo.spec.formats import tensor_format
from octavo.spec.recipe import Recipe
from octavo.spec.steps import STEPS, make_step

FAST = {"learned_rounding": {"steps": 8}, "svdquant": {"rank": 8}, "hqq": {"iterations": 4}, "awq": {"points": 7}}
every_step = pytest.mark.parametrize("name", sorted(cls.name for cls in ALGORITHMS))
KINDS = (
    "random",
    "outliers",
    "rank-deficient",
    "dead channels",
    "single sample",
    "zeros",
    "bf16",
    "twins",  # channels that are equal: no factorization without damping
    "wild",  # channels 16 decades apart
    "huge",  # squares that overflow in fp32
    "tiny",  # squares that vanish in fp32
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def batches(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randn(2048 if kind == "many" else 96, WIDTH, generator=generator)
        @ torch.randn(WIDTH, WIDTH, generator=generator)
        / 8
    )
    match kind:
        case "outliers":
            x[:, 7] *= 50
        case "rank-deficient":
            x = x[:, :3] @ torch.randn(3, WIDTH, generator=generator)
        case "dead channels":
            x[:, ::3] = 0
        case "single sample":
            x = x[:1]
        case "zeros":
            x = torch.zeros(4, WIDTH)
        case "twins":
            x[:, 1::2] = x[:, ::2]
        case "wild":
            x *= torch.logspace(-8, 8, WIDTH)
        case "huge":
            x *= 1e20
        case "tiny":
            x *= 1e-25
    return list(x.split(32))


def block_of(kind: str, fmt: str = "int4-group32", input_format: str | None = "int8-tensor") -> TensorBlock:
    given = None if input_format is None else tensor_format(input_format)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return TensorBlock(batches(kind), tensor_format(fmt), input_format=given, dtype=dtype)


def run(block: TensorBlock, *names: str) -> dict[str, str]:
    """The steps on the block, as the walk runs them."""
    steps = make_algorithms([make_step(name, FAST.get(name)) for name in names])
    block.gather(frozenset().union(*(algorithm.needs for _, algorithm in steps)) | {Need.RANGE})
    left: dict[str, str] = {}
    for _, algorithm in steps:
        before = block.copy()
        left |= algorithm.apply(block, block.layers())
        if algorithm.preserves_function:
            # bf16 weights are rounded when they are scaled
            assert block.error(before) <= (1e-9 if block.weights["first"].dtype is torch.float32 else 1e-3)
    return left


def stored(block: TensorBlock) -> list[torch.Tensor]:
    found = [*block.weights.values(), *block.scales.values(), *block.bias.values()]
    for q in block.fixed.values():
        found += [q.codes, q.scale.codes if isinstance(q.scale, QTensor) else q.scale]
    return found + [part for pair in block.branches.values() for part in pair]


def rounded(block: TensorBlock) -> TensorBlock:
    """What no step fixed is rounded to nearest."""
    for layer in block.layers():
        if layer not in block.fixed:
            block.weights[layer] = fake_quantize(block.weights[layer], block.fmt)
    return block


def test_every_step_has_its_algorithm():
    assert set(ALGORITHMS) == set(STEPS.values())


@every_step
@every_kind
def test_nothing_breaks_it_and_what_it_declares_is_true(name, kind):
    block, again = block_of(kind), block_of(kind)
    left = run(block, name)
    assert all(value.isfinite().all() for value in stored(block))
    assert set(left) <= set(block.layers())
    assert all(left.values())
    run(again, name)
    assert all(torch.equal(a, b) for a, b in zip(stored(block), stored(again), strict=True))


RAGGED = ["e4m3-tile128x128", "e4m3-group128-padded", "nf4"]  # blocks that the widths 64 and 96 do not fill


@every_step
@pytest.mark.parametrize(
    "fmt",
    [
        *("nvfp4", "mxfp4", "int4-group32-asymmetric", "int8-channel", "int4-group32-full-range"),
        *("nf4-double-quant", "int4-group32-double-quant", *RAGGED),
    ],
)
def test_fixed_weights_have_the_format_of_the_plan(name, fmt):
    block = block_of("random", fmt)
    run(block, name)
    for layer, codes in block.fixed.items():
        assert codes.format == tensor_format(fmt)
        assert torch.equal(codes.dequantize(), block.weights[layer])
    assert all(value.isfinite().all() for value in block.weights.values())


@every_step
def test_groups_that_do_not_divide_are_refused_before_any_step(name):
    recipe = Recipe("r", ()).quantize("operation:linear", weight="int4-group64").with_steps(make_step(name))
    model = torch.nn.Linear(96, 8)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match="groups of 64 do not divide in_features=96; choose"):
        octavo.quantize(model, recipe, [torch.randn(4, 96)])
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int4-group32", "int3-group32"])
@pytest.mark.parametrize(
    "names", [("awq",), ("gptq",), ("scale_search",), ("svdquant",), ("learned_rounding",)], ids=str
)
def test_outputs_are_nearer_than_by_rounding_to_nearest(names, fmt):
    reference = block_of("random", fmt, None)
    block = block_of("random", fmt, None)
    run(block, *names)
    assert rounded(block).error(reference) < 0.93 * rounded(reference.copy()).error(reference)


@pytest.mark.parametrize("name", ["awq", "gptq", "scale_search", "svdquant", "learned_rounding"])
@every_kind
def test_no_inputs_make_it_worse_than_rounding_to_nearest(name, kind):
    reference, block = block_of(kind, input_format=None), block_of(kind, input_format=None)
    run(block, name)
    nearest = rounded(reference.copy()).error(reference)
    assert rounded(block).error(reference) <= 1.01 * nearest + 1e-12


def test_steps_compose():
    reference, block = block_of("outliers", "mxfp4", None), block_of("outliers", "mxfp4", None)
    assert not run(block, "rotate", "svdquant", "gptq")
    assert set(block.fixed) == set(block.layers())
    assert block.error(reference) < 0.3 * rounded(reference.copy()).error(reference)


def error_of(
    name: str, options: dict[str, Any] | None = None, *, fmt: str = "int3-group32", kind: str = "random"
) -> float:
    """That a step leaves of a block's outputs."""
    reference, block = block_of(kind, fmt, None), block_of(kind, fmt, None)
    ((_, algorithm),) = make_algorithms([make_step(name, options)])
    block.gather(frozenset(algorithm.needs))
    algorithm.apply(block, block.layers())
    return block.error(reference)


def test_learned_rounding_betters_what_it_starts_from():
    assert error_of("learned_rounding", {"steps": 200}) < 0.95 * error_of("gptq")


def test_learned_rounding_fits_no_padding():
    """What a block makes of padding may be anything."""
    reference, block = block_of("random", "int3-group32", None), block_of("random", "int3-group32", None)
    ((_, algorithm),) = make_algorithms([make_step("learned_rounding", {"steps": 200})])
    reference.batches = [batch.view(2, 16, WIDTH) for batch in block.batches]
    block.batches = [torch.cat([batch, torch.ones(2, 16, WIDTH)], 1) for batch in reference.batches]
    block.masks = dict.fromkeys(range(len(block.batches)), torch.arange(32).expand(2, 32) < 16)
    block.gather(frozenset(algorithm.needs))
    block.kept = [(target.index_fill(1, torch.arange(16, 32), 100.0),) for (target,) in block.kept]
    algorithm.apply(block, block.layers())
    block.batches = reference.batches
    assert block.error(reference) < 0.95 * error_of("gptq")


@pytest.mark.parametrize("fmt", ["int3-group32", "int4-group32", "nvfp4"])
def test_layers_make_up_for_those_before_them_in_the_block(fmt):
    options = {"asymmetric": True, "sequential": True}
    assert error_of("gptq", options, fmt=fmt, kind="many") < 0.95 * error_of("gptq", fmt=fmt, kind="many")


@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"sequential": True, "asymmetric": True}], ids=str)
@pytest.mark.parametrize("inputs", ["mxfp4", "nvfp4", "int4-token"])
def test_weights_make_up_for_the_rounding_of_their_inputs(inputs, options):
    """Inputs that lie near few directions, as those of trained models do: in the others there is mostly noise."""
    generator = torch.Generator().manual_seed(5)
    spread = torch.logspace(0, -2, WIDTH).unsqueeze(1) * torch.randn(WIDTH, WIDTH, generator=generator)
    errors = []
    for rounded_inputs in (False, True):
        reference, block = (block_of("many", "int8-channel", inputs) for _ in range(2))
        reference.batches = block.batches = [batch @ spread for batch in block.batches]
        ((_, algorithm),) = make_algorithms([make_step("gptq", {**options, "rounded_inputs": rounded_inputs})])
        block.gather(frozenset(algorithm.needs))
        algorithm.apply(block, block.layers())
        block.rounds_inputs = True
        errors.append(block.error(reference))
    assert errors[1] < 0.97 * errors[0]


@every_kind
@pytest.mark.parametrize("inputs", ["mxfp4", "int8-tensor"])
def test_no_inputs_break_what_makes_up_for_their_rounding(kind, inputs):
    found = []
    for _ in range(2):
        block = block_of(kind, input_format=inputs)
        ((_, algorithm),) = make_algorithms([make_step("gptq", {"rounded_inputs": True})])
        block.gather(frozenset(algorithm.needs))
        algorithm.apply(block, block.layers())
        found.append(stored(block))
        assert all(value.isfinite().all() for value in found[-1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_layer_without_data_is_left_with_the_reason():
    block = block_of("random")
    block.batches = []
    left = run(block, "gptq")
    assert set(left) == set(block.layers())
    assert "calibration" in left["first"] or "Gram" in left["first"]


@pytest.mark.parametrize("before", [(), ("gptq",)], ids=["rounded to nearest", "fixed"])
def test_bias_correction_gives_outputs_their_means_back(before):
    reference, block = block_of("random", "int3-group32", None), block_of("random", "int3-group32", None)
    steps = make_algorithms([make_step(name) for name in (*before, "bias_correction")])
    block.gather(frozenset().union(*(algorithm.needs for _, algorithm in steps)))
    for _, algorithm in steps:
        assert not algorithm.apply(block, ["last"])
    plain = block.copy()
    plain.bias["last"] = torch.zeros(WIDTH)
    for one in (block, plain):
        if not before:
            one.weights["last"] = fake_quantize(one.weights["last"], one.fmt)
    corrected, uncorrected = (mean_output(one) - mean_output(reference) for one in (block, plain))
    assert uncorrected.abs().max() > 1e-3
    assert corrected.abs().max() < 1e-5


def mean_output(block: TensorBlock) -> torch.Tensor:
    return torch.cat([block.run(index)[0] for index in block.inputs()]).mean(0)


def test_a_layer_without_bias_gets_one_only_if_asked():
    block = block_of("random")
    left = run(block, "bias_correction")
    assert set(left) == {"first", "left", "right"}
    assert "add" in left["first"]
    ((_, algorithm),) = make_algorithms([make_step("bias_correction", {"add": True})])
    assert not algorithm.apply(block, block.layers())
    assert set(block.bias) == set(block.layers())
