"""A plan's account adds up, survives a file, and says what differs from another."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from hand_made_facts import clip, encoder, linear, mixture, model, norm
from octavo.errors import UserError
from octavo.spec.beside import Beside
from octavo.spec.facts import ModelFacts, Slot
from octavo.spec.formats import FORMATS
from octavo.spec.plan import Change, Decision, ObserverSpec, Plan, QuantizerSpec
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve
from octavo.spec.steps import make_step

MODELS = [clip(), encoder(), mixture()]
INT8 = Recipe("mine", ()).quantize("operation:linear", weight="int8-channel", input="int8-tensor")


@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts.model)
def test_the_account_adds_up_to_the_model(facts: ModelFacts) -> None:
    plan = resolve(load_recipe("fp8-attention"), facts)
    rows = plan.account()
    assert sum(row.num_sites for row in rows) == len(facts.sites)
    assert sum(row.num_parameters for row in rows) == facts.num_parameters
    assert sum(row.macs or 0 for row in rows) == sum(site.macs or 0 for site in facts.sites)
    buffers = facts.total_bytes - sum(row.bytes_before for row in rows)
    assert plan.bytes_after == buffers + sum(row.bytes_after for row in rows)


def test_shares_count_weights_only() -> None:
    plan = resolve(INT8, model("m", [linear("fc", 8, 4), norm("ln", 4)]))
    assert plan.parameters_covered == 32 / (32 + 8 + 8)
    assert plan.macs_covered == 1.0


def test_an_activation_quantizer_alone_covers_no_parameters() -> None:
    plan = resolve(Recipe("mine", ()).quantize("fc", input="int8-tensor"), model("m", [linear("fc", 8, 4)]))
    assert (plan.parameters_covered, plan.macs_covered) == (0.0, 0.0)


def test_without_a_trace_the_share_of_multiply_adds_is_unknown() -> None:
    site = dataclasses.replace(linear("fc", 8, 4), macs=None)
    plan = resolve(INT8, dataclasses.replace(model("m", [site]), was_traced=False))
    assert plan.macs_covered is None
    assert plan.account()[0].macs is None


def test_a_model_without_parameters_is_covered_by_nothing() -> None:
    plan = Plan(ModelFacts("m", "M", (), 0, 0, was_traced=True), "none", ())
    assert (plan.parameters_covered, plan.macs_covered, plan.bytes_after) == (0.0, 0.0, 0)


def test_bytes_are_codes_scales_and_what_stays() -> None:
    plan = resolve(INT8, model("m", [linear("fc", 8, 4), norm("ln", 4)], buffers=100))
    codes, scales, bias, layer_norm, input_scale = 32, 8 * 4, 8 * 4, 8 * 4, 4
    assert plan.bytes_before == 32 * 4 + bias + layer_norm + 100
    assert plan.bytes_after == codes + scales + bias + layer_norm + input_scale + 100


def test_branches_are_counted_before_there_are_any() -> None:
    facts = model("m", [linear("fc", 64, 48), linear("small", 16, 8)])
    plain = resolve(INT8, facts)
    plan = resolve(INT8.with_steps(make_step("svdquant", {"rank": 16})), facts)
    assert plan.bytes_after - plain.bytes_after == 16 * (64 + 48) * 4
    done = plan.with_beside({"small": Beside(num_scales=16, num_biases=8, rotation=4)})
    assert done.bytes_after - plain.bytes_after == 16 * 4 + 8 * 4
    assert Plan.from_json(done.to_json()) == done


def test_a_dynamic_range_is_not_stored() -> None:
    facts = model("m", [linear("fc", 8, 4)])
    static, dynamic = resolve(load_recipe("int8"), facts), resolve(load_recipe("int8-dynamic"), facts)
    assert static.bytes_after - dynamic.bytes_after == 4


def test_half_precision_weights_are_counted_by_their_own_bytes() -> None:
    site = dataclasses.replace(linear("fc", 8, 4), parameter_bytes=2 * 40)
    decision = Decision(site, {Slot.WEIGHT: QuantizerSpec(FORMATS["int8-tensor"])})
    assert decision.weight_bytes_before == 64
    assert decision.bytes_after == 32 + 4 + 16


def test_quantizers_come_in_model_order_under_their_full_names() -> None:
    plan = resolve(INT8, model("m", [linear("a", 4, 4), linear("b.c", 4, 4)]))
    names = [name for name, _ in plan.quantizers()]
    assert names == ["a.weight_quantizer", "a.input_quantizer", "b.c.weight_quantizer", "b.c.input_quantizer"]


@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts.model)
@pytest.mark.parametrize("recipe", ["fp8-attention", "int8", "fp8-dynamic"])
def test_a_plan_reads_back_from_its_file(facts: ModelFacts, recipe: str) -> None:
    plan = resolve(
        load_recipe(recipe).leave("*.q_proj*", why="x") if facts is MODELS[0] else load_recipe(recipe), facts
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_what_is_not_a_plan_is_refused() -> None:
    text = resolve(INT8, encoder()).to_json()
    with pytest.raises(UserError, match=r"a plan of schema 'octavo.plan/9': this octavo reads 'octavo.plan/1'"):
        Plan.from_json(text.replace("octavo.plan/1", "octavo.plan/9"))
    with pytest.raises(UserError, match="not a plan that octavo wrote"):
        Plan.from_json(json.dumps({"schema": "octavo.plan/1"}))
    for broken in ("", "[]", "{", text.replace('"linear"', "7").replace('"weight"', '"wieght"')):
        with pytest.raises(UserError, match="plan"):
            Plan.from_json(broken)


def test_a_diff_names_what_is_added_dropped_and_changed() -> None:
    facts = model("m", [linear("a", 4, 4), linear("b", 4, 4)])
    before = resolve(INT8.leave("b.weight_quantizer"), facts)
    after = resolve(INT8.leave("a.input_quantizer").with_observer("mse"), facts)
    assert before.diff(before) == ()
    assert before.diff(after) == (
        Change("a.input_quantizer", "int8-tensor, absmax", ""),
        Change("b.input_quantizer", "int8-tensor, absmax", "int8-tensor, mse"),
        Change("b.weight_quantizer", "", "int8-channel, absmax"),
    )


def test_an_unknown_site_is_answered_with_near_names() -> None:
    with pytest.raises(UserError, match=r"the plan has no site 'poler.dense': near names are pooler.dense"):
        resolve(INT8, encoder()).decision("poler.dense")


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, math.nan])
def test_a_percentile_lies_between_0_and_100(percentile: float) -> None:
    with pytest.raises(UserError, match="is not between 0 and 100"):
        ObserverSpec("percentile", percentile)
