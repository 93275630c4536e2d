"""Later rules win slot by slot; nothing is skipped in silence; what cannot be is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made_facts import attention, clip, encoder, fits, linear, mixture, model, norm
from octavo.errors import UserError
from octavo.spec.facts import ModelFacts, SiteFacts, Slot
from octavo.spec.plan import ObserverSpec
from octavo.spec.recipe import Recipe, load_recipe, preset_names, read_recipe
from octavo.spec.resolve import resolve

INT8 = Recipe("mine", ()).quantize("operation:linear", weight="int8-channel", input="int8-tensor")
ENCODER = encoder()
QUERY_0 = "encoder.layer.0.attention.self.query"
NORM_0 = "encoder.layer.0.output.LayerNorm"


def formats(recipe: Recipe, site: str, facts: ModelFacts = ENCODER) -> dict[str, str]:
    return {slot.value: str(spec) for slot, spec in resolve(recipe, facts).decision(site).scheme.items()}


def refusal(recipe: Recipe, facts: ModelFacts = ENCODER) -> str:
    with pytest.raises(UserError) as caught:
        resolve(recipe, facts)
    return str(caught.value)


@pytest.mark.parametrize("facts", [clip(), ENCODER, mixture()], ids=lambda facts: facts.model)
@pytest.mark.parametrize("name", preset_names())
def test_every_site_of_every_preset_has_a_rule_or_a_reason(name: str, facts: ModelFacts) -> None:
    recipe = load_recipe(name)
    if not fits(recipe, facts):
        assert "do not divide in_features" in refusal(recipe, facts)
        return
    plan = resolve(recipe, facts)
    assert [decision.site for decision in plan.decisions] == list(facts.sites)
    assert all(decision.rule or decision.why for decision in plan.decisions)
    assert all(decision.rule for decision in plan.decisions if decision.is_quantized)
    assert all(decision.why for decision in plan.decisions if not decision.is_quantized)


def test_a_later_scheme_wins_for_the_slots_it_names() -> None:
    recipe = INT8.quantize("*.query", weight="e4m3-tensor", output="e4m3-tensor")
    assert formats(recipe, QUERY_0) == {"weight": "e4m3-tensor", "input": "int8-tensor", "output": "e4m3-tensor"}


def test_the_decision_names_every_rule_that_gave_something() -> None:
    decision = resolve(INT8.quantize("*.query", weight="e4m3-tensor", origin="mine rule 2"), ENCODER).decision(QUERY_0)
    assert decision.rule == "mine rule 2 (*.query) + quantize() (operation:linear)"


def test_a_later_leave_wins() -> None:
    decision = resolve(INT8.leave("*.query", why="hurts", origin="--leave"), ENCODER).decision(QUERY_0)
    assert (decision.scheme, decision.rule, decision.why) == ({}, "--leave (*.query)", "left by --leave: hurts")


def test_a_scheme_after_a_leave_wins() -> None:
    assert formats(INT8.leave("*.query").quantize("*layer.0.*query", weight="int8-tensor"), QUERY_0) == {
        "weight": "int8-tensor"
    }


def test_leaving_a_quantizer_takes_only_that_quantizer() -> None:
    decision = resolve(INT8.leave("*.query.input_quantizer"), ENCODER).decision(QUERY_0)
    assert set(decision.scheme) == {Slot.WEIGHT}
    assert decision.rule == "quantize() (operation:linear)"
    assert decision.why == "input_quantizer left by leave() (*.query.input_quantizer)"


def test_leaving_a_quantizer_that_nothing_asked_for_changes_nothing() -> None:
    decision = resolve(INT8.leave("*.output_quantizer"), ENCODER).decision(QUERY_0)
    assert (set(decision.scheme), decision.why) == ({Slot.WEIGHT, Slot.INPUT}, "")


def test_the_softmax_quantizer_is_left_under_either_name() -> None:
    recipe = INT8.quantize("operation:attention", query="e4m3-tensor", softmax="e4m3-tensor")
    for name in ("softmax_quantizer", "p_bmm_quantizer"):
        assert formats(recipe.leave(f"*{name}"), "encoder.layer.0.attention.self") == {"query": "e4m3-tensor"}


@pytest.mark.parametrize("pattern", ["*", "*input_quantizer", "*layer.0*", "re:.*", "type:*", "operation:*"])
def test_a_broad_pattern_never_reaches_a_norm(pattern: str) -> None:
    assert formats(INT8.quantize(pattern, input="int8-tensor"), NORM_0) == {}


@pytest.mark.parametrize(
    "pattern", ["*.LayerNorm", "operation:norm", "type:LayerNorm", "*LayerNorm.input_quantizer", NORM_0]
)
def test_a_pattern_that_names_norms_reaches_them(pattern: str) -> None:
    assert formats(INT8.quantize(pattern, input="int8-tensor"), NORM_0) == {"input": "int8-tensor"}


def test_each_reason_for_staying_is_told() -> None:
    plan = resolve(INT8, ENCODER)
    assert plan.decision(NORM_0).why == "norm: not quantized unless a rule names it"
    assert plan.decision("embeddings.word_embeddings").why == "no rule selects embedding"
    assert plan.decision("encoder.layer.0.attention.self").why == "no rule selects attention"
    assert resolve(INT8, clip()).decision("vision_model.embeddings").why == "nothing here takes a quantizer"


def test_a_preset_leaves_routers_with_its_reason() -> None:
    decision = resolve(load_recipe("fp8"), mixture()).decision("model.layers.0.mlp.gate")
    assert decision.rule == "fp8 rule 3 (*.gate)"
    assert decision.why == "left by fp8 rule 3: routes tokens to experts: tiny, and an error sends a token elsewhere"


def test_a_tied_weight_is_decided_by_its_owner() -> None:
    plan = resolve(INT8.quantize("operation:embedding", weight="int8-channel"), mixture())
    assert plan.decision("model.embed_tokens").weight is not None
    assert plan.decision("lm_head").why == "tied to model.embed_tokens"
    assert not plan.decision("lm_head").is_quantized


def test_a_rule_for_a_tied_weight_alone_is_a_warning() -> None:
    (warning,) = resolve(INT8.quantize("lm_head", weight="int8-tensor"), mixture()).warnings
    assert warning == (
        "quantize() (lm_head) changes nothing: the parameter is decided where it lives, at model.embed_tokens"
    )


def test_an_obstacle_is_the_reason() -> None:
    blocked = dataclasses.replace(linear("odd", 4, 4), obstacle="MyLinear has a forward of its own; octavo.register it")
    plan = resolve(INT8, model("m", [linear("fc", 4, 4), blocked]))
    assert (plan.decision("odd").scheme, plan.decision("odd").why) == ({}, blocked.obstacle)
    (warning,) = resolve(INT8.quantize("odd", weight="int8-tensor"), model("m", [linear("fc", 4, 4), blocked])).warnings
    assert warning == f"quantize() (odd) changes nothing: {blocked.obstacle}"


def test_an_optional_scheme_that_matches_nothing_is_a_warning() -> None:
    facts = model("mlp", [linear("fc", 4, 4)])
    assert resolve(load_recipe("fp8-attention"), facts).warnings == (
        "fp8-attention rule 1 (operation:attention) matches nothing in this model",
    )
    assert resolve(load_recipe("fp8"), facts).warnings == ()


def test_attention_that_was_not_looked_for_is_told_apart() -> None:
    facts = dataclasses.replace(model("mlp", [linear("fc", 4, 4)]), was_traced=False)
    (warning,) = resolve(load_recipe("fp8-attention"), facts).warnings
    assert warning.endswith("(attention calls are only seen in a forward pass, and none was traced)")
    assert "none was traced" in refusal(INT8.leave("*q_bmm_quantizer"), facts)


def test_a_pattern_that_matches_nothing_is_named_with_rule_and_nearest() -> None:
    recipe = read_recipe("extends: fp8\nrules:\n  - select: '*.qery'\n    leave: true\n", "my.yaml", default_name="my")
    message = refusal(recipe)
    assert message.startswith("pattern '*.qery' (my rule 1 (my.yaml:3)) matches no layer and no quantizer")
    assert "did you mean '*.query'" in message


def test_every_pattern_of_a_rule_must_match() -> None:
    assert "pattern '*.qery'" in refusal(INT8.leave("*.query", "*.qery"))


def test_a_slot_that_exists_nowhere_is_named_with_those_that_do() -> None:
    assert refusal(INT8.quantize("*.query", "*.key", softmax="int8-tensor")) == (
        "quantize(): none of the 12 sites that '*.query' or '*.key' matches lets a rule give it 'softmax'; "
        "what it may give is weight, input, output"
    )
    assert refusal(INT8.quantize("*input_quantizer", weight="int8-tensor")).endswith("what it may give is input")


def test_a_slot_that_exists_at_some_of_the_sites_is_enough() -> None:
    recipe = Recipe("mine", ()).quantize("*layer.0*", weight="int8-tensor", query="int8-tensor")
    assert formats(recipe, QUERY_0) == {"weight": "int8-tensor"}
    assert formats(recipe, "encoder.layer.0.attention.self") == {"query": "int8-tensor"}


def test_a_width_that_the_group_does_not_divide_is_refused_by_layer() -> None:
    message = refusal(load_recipe("int4-group"), model("m", [linear("blocks.3.mlp.up", 8, 100), linear("fc", 8, 256)]))
    assert message.startswith("layer 'blocks.3.mlp.up': groups of 128 do not divide in_features=100; choose 4, ")
    assert message.endswith("or leave it out with a rule (--leave 'blocks.3.mlp.up')")


def test_groups_of_an_input_must_fit_before_any_data_is_seen() -> None:
    facts = model("m", [linear("up", 8, 100)])
    message = refusal(Recipe("mine", ()).quantize("operation:linear", input="nvfp4"), facts)
    assert message.startswith("layer 'up': groups of 16 do not divide in_features=100; choose 4, 5, 10")


def test_groups_of_a_convolutions_input_are_refused() -> None:
    site = dataclasses.replace(linear("stem", 8, 64), operation="conv")
    message = refusal(Recipe("mine", ()).quantize("operation:conv", input="mxfp4"), model("m", [site]))
    assert "not the channels" in message


def test_many_misfits_are_one_error_with_a_count() -> None:
    lines = refusal(load_recipe("int4-group"), clip()).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "and 39 more layers that do not fit; one pattern may leave out many"


def test_leaving_the_misfits_out_is_a_way_out() -> None:
    facts = model("m", [linear("odd", 8, 100), linear("fc", 8, 256)])
    plan = resolve(load_recipe("int4-group").leave("odd"), facts)
    assert [name for name, _ in plan.quantizers()] == ["fc.weight_quantizer"]


def test_a_recipe_that_quantizes_nothing_is_refused_with_the_reasons() -> None:
    facts = model("m", [norm("ln", 4), attention("attn", 4)])
    assert refusal(load_recipe("fp8"), facts) == (
        "recipe 'fp8' quantizes nothing in 'm': 1 x norm: not quantized unless a rule names it; "
        "1 x no rule selects attention"
    )
    assert "left by leave() (*)" in refusal(INT8.leave("*"))


def test_the_observer_of_the_recipe_reaches_the_plan() -> None:
    plan = resolve(INT8.with_observer("entropy"), ENCODER)
    scheme = plan.decision(QUERY_0).scheme
    assert (scheme[Slot.INPUT].observer, scheme[Slot.WEIGHT].observer) == (ObserverSpec("entropy"), ObserverSpec())


def test_the_target_is_kept() -> None:
    assert resolve(INT8, ENCODER, "vllm").target == "vllm"


SITES = st.lists(
    st.builds(lambda a, b, kind: (f"{a}.{b}", kind), st.integers(0, 2), st.sampled_from("qkv"), st.sampled_from("lan")),
    min_size=1,
    max_size=6,
    unique_by=lambda pair: pair[0],
)
ACTIONS = st.tuples(
    st.sampled_from(
        ["*", "0.*", "*.q", "*input_quantizer", "operation:linear", "operation:norm", "*.k.weight_quantizer"]
    ),
    st.sampled_from([None, {"weight": "int8-tensor"}, {"input": "e4m3-tensor"}, {"query": "e4m3-tensor"}]),
)


def _site(name: str, kind: str) -> SiteFacts:
    return {"l": linear(name, 8, 8), "a": attention(name, 8), "n": norm(name, 8)}[kind]


@given(SITES, st.lists(ACTIONS, max_size=5))
def test_the_last_rule_always_has_its_way(sites: list[tuple[str, str]], actions: list[tuple[str, dict | None]]) -> None:
    facts = model("m", [linear("base.fc", 8, 8), *(_site(name, kind) for name, kind in sites)])
    recipe = Recipe("mine", ()).quantize("base.fc", weight="int8-channel")
    for pattern, formats_of in actions:
        recipe = recipe.leave(pattern) if formats_of is None else recipe.quantize(pattern, **formats_of)
    try:
        plan = resolve(recipe.quantize("base.fc", weight="e5m2-tensor"), facts)
        left = resolve(recipe.leave("base.fc.weight_quantizer").quantize("base.fc", output="int8-tensor"), facts)
    except UserError:
        return
    assert str(plan.decision("base.fc").weight) == "e5m2-tensor"
    assert left.decision("base.fc").weight is None
    assert plan.decisions[1:] == left.decisions[1:]
