"""The coverage account: every parameter and multiply-add in exactly one row, and the threshold on it."""

from __future__ import annotations

import dataclasses

import pytest

from hand_made_facts import clip, encoder, fits, linear, mixture, model, norm
from octavo.errors import UserError
from octavo.spec.coverage import State, check_coverage
from octavo.spec.facts import ModelFacts
from octavo.spec.recipe import Recipe, presets
from octavo.spec.resolve import resolve

INT8 = Recipe("mine", ()).quantize("operation:linear", weight="int8-channel")


MODELS = (clip(), encoder(), mixture())
FITTING = [
    pytest.param(facts, recipe, id=f"{recipe.name}-{facts.model}")
    for recipe in presets()
    for facts in MODELS
    if fits(recipe, facts)
]


@pytest.mark.parametrize(("facts", "recipe"), FITTING)
def test_the_rows_add_up_to_the_model(facts: ModelFacts, recipe: Recipe) -> None:
    plan = resolve(recipe, facts)
    rows = plan.coverage()
    assert sum(row.num_parameters for row in rows) == facts.num_parameters
    assert sum(row.macs or 0 for row in rows) == sum(site.macs or 0 for site in facts.sites)
    assert len({(row.state, row.reason) for row in rows}) == len(rows)
    weights = sum(row.num_parameters for row in rows if row.state is State.QUANTIZED)
    assert weights / facts.num_parameters == plan.parameters_covered


def test_each_state_has_its_reason() -> None:
    lost = dataclasses.replace(norm("tower.ln", 4), unreached="tower")
    facts = model("m", [linear("fc", 8, 4), linear("head", 2, 4), norm("ln", 4), lost])
    plan = resolve(INT8.leave("head", why="the classifier"), facts)
    found = {row.state: (row.reason, row.num_parameters) for row in plan.coverage() if "beside" not in row.reason}
    assert found == {
        State.QUANTIZED: ("quantize() (operation:linear)", 32),
        State.LEFT_BY_RULE: ("left by leave(): the classifier", 10),
        State.LEFT_BY_DEFAULT: ("norm: not quantized unless a rule names it", 8),
        State.NOT_REACHED: ("the sample does not get to 'tower'", 8),
    }


def test_a_tied_layer_counts_where_its_weight_is_quantized() -> None:
    facts = model("m", [linear("first", 8, 4), linear("second", 8, 4, tied_to="first")])
    plan = resolve(INT8, facts)
    assert plan.macs_covered == 1.0
    assert {row.state: row.macs for row in plan.coverage()}[State.QUANTIZED] == 2 * 16 * 32


def test_a_rule_for_what_the_sample_misses_is_a_warning() -> None:
    lost = dataclasses.replace(linear("tower.fc", 8, 4), unreached="tower")
    plan = resolve(INT8, model("m", [linear("fc", 8, 4), lost]))
    assert any("does not get to 'tower' (1 site)" in warning for warning in plan.warnings)


def test_too_little_coverage_is_refused_with_the_largest_parts() -> None:
    plan = resolve(INT8.leave("head", why="the classifier"), model("m", [linear("fc", 8, 4), linear("head", 30, 4)]))
    check_coverage(plan, 0.15)
    with pytest.raises(UserError, match=r"(?s)16\.8 %.*required 50 %.*78\.9 %  head: left by rule, .*the classifier"):
        check_coverage(plan, 0.5)
    with pytest.raises(UserError, match="not a share between 0 and 1"):
        check_coverage(plan, 95)
