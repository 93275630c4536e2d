"""A target fixes zero points and weight bits before anything is simulated."""

from __future__ import annotations

import pytest

from octavo.errors import UserError
from octavo.spec.facts import ModelFacts, SiteFacts, Slot
from octavo.spec.plan import Plan
from octavo.spec.recipe import load_recipe
from octavo.spec.resolve import resolve
from octavo.spec.targets import TARGETS, target_named

SITE = SiteFacts(
    "fc",
    "linear",
    "Linear",
    (Slot.WEIGHT, Slot.INPUT, Slot.OUTPUT),
    weight_shape=(8, 256),
    parameters={"fc.weight": 2048},
)
FACTS = ModelFacts("m", "M", (SITE,), 2048, 8192, True)


def formats(recipe: str, target: str) -> tuple[str, str]:
    scheme = resolve(load_recipe(recipe), FACTS, target).decisions[0].scheme
    return str(scheme[Slot.WEIGHT]), str(scheme.get(Slot.INPUT, "-"))


@pytest.mark.parametrize(
    ("recipe", "target", "expected"),
    [
        ("int8", "", ("int8-channel", "int8-tensor")),
        ("int8", "onnxruntime-cpu", ("int7-channel", "int8-tensor-asymmetric")),
        ("int8", "onnxruntime-cpu-vnni", ("int8-channel", "int8-tensor-asymmetric")),
        ("int8", "onnxruntime-cpu-avx2", ("int8-channel", "int8-tensor-asymmetric")),
        ("int8", "tensorrt", ("int8-channel", "int8-tensor")),
        ("int8-dynamic", "onnxruntime-cpu", ("int7-channel", "int8-tensor-asymmetric dynamic")),
        ("int8-weight-only", "onnxruntime-cpu", ("int8-channel", "-")),
        ("fp8", "onnxruntime-cpu", ("e4m3-tensor", "e4m3-tensor")),
    ],
)
def test_formats_follow_the_target(recipe: str, target: str, expected: tuple[str, str]) -> None:
    assert formats(recipe, target) == expected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "fp8", "int4-group"])
def test_a_plan_for_a_target_is_not_changed_by_it_again(recipe: str, target: str) -> None:
    from octavo.spec.resolve import for_target

    plan = resolve(load_recipe(recipe), FACTS, target)
    assert [for_target(d, target_named(target)) for d in plan.decisions] == list(plan.decisions)


def test_every_rule_of_a_target_names_its_source() -> None:
    assert all(rule.source.startswith("https://") for target in TARGETS.values() for rule in target.rules)


def test_what_a_target_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="tensorrt has no integer activations whose range is found per call"):
        formats("int8-dynamic", "tensorrt")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("w4a8", "multiplies integers with integers"),
        ("w4a8-mxfp4", "small floats without E8M0 scales"),
        ("int4-group-asymmetric", "no weights with zero points .fc is int4"),
    ],
)
def test_what_tensorrt_cannot_build_is_refused(recipe: str, said: str) -> None:
    with pytest.raises(UserError, match=f"tensorrt .*{said}"):
        formats(recipe, "tensorrt")


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'tensorrt'"):
        formats("int8", "tensort")


def test_attention_in_fp8_gets_the_softmax_that_tensorrt_fuses() -> None:
    slots = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
    facts = ModelFacts("m", "M", (SITE, SiteFacts("attn", "attention", "Attention", slots)), 2048, 8192, True)
    anywhere = resolve(load_recipe("fp8-attention"), facts, "").decisions[1].scheme
    tensorrt = resolve(load_recipe("fp8-attention"), facts, "tensorrt").decisions[1].scheme
    assert Slot.SOFTMAX not in anywhere
    assert tensorrt[Slot.SOFTMAX].observer.name == "unit"


def test_onnxruntime_wants_the_outputs_of_convolutions() -> None:
    conv = SiteFacts("conv", "conv", "Conv2d", SITE.slots, weight_shape=(8, 256), parameters={"conv.weight": 2048})
    facts = ModelFacts("m", "M", (conv,), 2048, 8192, True)
    for recipe, expected in (("int8", True), ("int8-weight-only", False), ("int8-dynamic", False), ("fp8", False)):
        scheme = resolve(load_recipe(recipe), facts, "onnxruntime-cpu").decisions[0].scheme
        assert (Slot.OUTPUT in scheme) == expected, recipe


@pytest.mark.parametrize(
    ("recipe", "target", "saturates"),
    [
        ("int8", "onnxruntime-cpu-avx2", True),
        ("int8-dynamic", "onnxruntime-cpu-avx2", True),
        ("int8-weight-only", "onnxruntime-cpu-avx2", False),
        ("fp8", "onnxruntime-cpu-avx2", False),
        ("int8", "onnxruntime-cpu", False),
        ("int8", "onnxruntime-cpu-vnni", False),
    ],
)
def test_a_plan_says_where_sums_of_bytes_saturate(recipe: str, target: str, saturates: bool) -> None:
    plan = resolve(load_recipe(recipe), FACTS, target)
    said = [warning for warning in plan.warnings if "saturate" in warning]
    assert bool(said) == saturates
    assert all("--target onnxruntime-cpu" in warning for warning in said)


def _residual() -> ModelFacts:
    """stem -> first -> (+ stem) -> second, a sum of what convolutions give."""
    convs = [
        SiteFacts(name, "conv", "Conv", SITE.slots, weight_shape=(8, 72), parameters={f"{name}.weight": 576})
        for name in ("stem", "first", "second")
    ]
    slots = (Slot.LEFT, Slot.RIGHT, Slot.OUTPUT)
    add = SiteFacts("sum", "add", "Add", slots, adds=("first", "stem"))
    return ModelFacts("m", "M", (*convs[:2], add, convs[2]), 1728, 6912, True)


@pytest.mark.parametrize(
    ("recipe", "target", "expected"),
    [
        ("int8", "", set()),
        ("int8", "onnxruntime-cpu", {Slot.LEFT, Slot.RIGHT, Slot.OUTPUT}),
        ("int8", "onnxruntime-cpu-vnni", {Slot.LEFT, Slot.RIGHT, Slot.OUTPUT}),
        ("int8-dynamic", "onnxruntime-cpu", set()),
        ("int8-weight-only", "onnxruntime-cpu", set()),
        ("int8", "tensorrt", {Slot.RIGHT}),
        ("int8-weight-only", "tensorrt", set()),
        ("int8", "onnxruntime-cuda", set()),
    ],
)
def test_residual_sums_get_what_the_target_wants(recipe: str, target: str, expected: set[Slot]) -> None:
    plan = resolve(load_recipe(recipe), _residual(), target)
    decision = plan.decision("sum")
    assert set(decision.scheme) == expected
    if expected:
        assert decision.rule == f"target {target}"
        assert {str(spec) for spec in decision.scheme.values()} == {str(plan.decision("stem").scheme[Slot.INPUT])}


def test_a_residual_sum_stays_in_float_where_a_rule_or_a_source_does() -> None:
    for leave in ("sum", "stem"):
        plan = resolve(load_recipe("int8").leave(leave), _residual(), "onnxruntime-cpu")
        assert not plan.decision("sum").scheme


def test_norms_that_a_runtime_would_compute_in_float_are_said() -> None:
    conv = SiteFacts("conv", "conv", "Conv2d", SITE.slots, weight_shape=(8, 256), parameters={"conv.weight": 2048})
    for facts, target, is_said in (
        ({"stays": "it has a forward of its own"}, "onnxruntime-cpu", True),
        ({"stays": "it has a forward of its own"}, "", False),
        ({"folds_into": "conv"}, "onnxruntime-cpu", False),
        ({}, "onnxruntime-cpu", False),  # of another kind
    ):
        norm = SiteFacts("norm", "norm", "Norm", (Slot.INPUT,), parameters={"norm.weight": 8}, **facts)
        plan = resolve(load_recipe("int8"), ModelFacts("m", "M", (conv, norm), 2056, 8224, True), target)
        assert any("'norm'" in warning and "in float" in warning for warning in plan.warnings) == is_said
        assert plan.decision("norm").folded_into == facts.get("folds_into", "")


def test_a_norm_is_folded_into_a_quantized_layer_unless_a_rule_speaks_of_it() -> None:
    conv = SiteFacts("conv", "conv", "Conv2d", SITE.slots, weight_shape=(8, 256), parameters={"conv.weight": 2048})
    other = SiteFacts("other", "linear", "Linear", SITE.slots, weight_shape=(8, 256), parameters={"other.weight": 2048})
    norm = SiteFacts("norm", "norm", "Norm", (Slot.INPUT,), parameters={"norm.weight": 8}, folds_into="conv")
    facts = ModelFacts("m", "M", (conv, norm, other), 4104, 16416, True)
    plan = resolve(load_recipe("int8"), facts)
    assert plan.decision("norm").folded_into == "conv"
    assert Plan.from_json(plan.to_json()) == plan
    for leave, why in (("norm", "left by"), ("conv", "the layer before it is not quantized")):
        left = resolve(load_recipe("int8").leave(leave), facts).decision("norm")
        assert not left.folded_into
        assert why in left.why
