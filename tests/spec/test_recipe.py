"""Recipes are read with messages that name file and line, and written so that they read back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import UserError
from octavo.spec.facts import Slot
from octavo.spec.formats import FORMATS
from octavo.spec.plan import OBSERVERS, ObserverSpec
from octavo.spec.recipe import Calibration, Recipe, load_recipe, preset_names, presets, read_recipe
from octavo.spec.rule import Leave, Rule, slot_rule
from octavo.spec.tensor_format import PLAIN_FP32, PerGroup, TensorFormat

PRESETS = (
    "best-int4-group",
    "best-int4-group32",
    "best-nvfp4",
    "best-nvfp4-weight-only",
    "best-w4a8",
    "fp8",
    "fp8-attention",
    "fp8-block",
    "fp8-dynamic",
    "fp8-kv",
    "int4-gptq",
    "int4-group",
    "int4-group-asymmetric",
    "int4-group-double-quant",
    "int4-group-full-range",
    "int4-group32",
    "int4-group64",
    "int8",
    "int8-dynamic",
    "int8-weight-only",
    "mxfp4",
    "mxfp4-weight-only",
    "mxfp6",
    "mxfp6-e2m3",
    "mxfp8",
    "mxint8",
    "nf4",
    "nf4-double-quant",
    "nvfp4",
    "nvfp4-four-over-six",
    "nvfp4-gptq",
    "nvfp4-kv",
    "nvfp4-weight-only",
    "w4a4-int",
    "w4a8",
    "w4a8-mxfp4",
    "w4a8-nvfp4",
)


def read(text: str) -> Recipe:
    return read_recipe(text, "mine.yaml")


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text)
    return str(caught.value)


def test_the_documented_presets_are_there_in_alphabetical_order() -> None:
    assert set(PRESETS) <= set(preset_names())
    assert list(preset_names()) == sorted(preset_names())


@pytest.mark.parametrize("recipe", presets(), ids=lambda recipe: recipe.name)
def test_a_preset_reads_back_from_its_own_yaml(recipe: Recipe) -> None:
    assert read(recipe.to_yaml()) == recipe
    assert recipe.description.endswith(".")


@pytest.mark.parametrize("recipe", presets(), ids=lambda recipe: recipe.name)
def test_every_rule_of_a_preset_may_match_nothing(recipe: Recipe) -> None:
    assert all(rule.is_optional for rule in recipe.rules)


@pytest.mark.parametrize("recipe", presets(), ids=lambda recipe: recipe.name)
def test_presets_keep_output_heads_and_routers(recipe: Recipe) -> None:
    left = [pattern for rule in recipe.rules if isinstance(rule.action, Leave) for pattern in rule.select]
    assert {"*lm_head*", "*.router", "*.gate"} <= set(left)


def test_fp8_attention_is_fp8_and_one_rule_more() -> None:
    base, more = load_recipe("fp8"), load_recipe("fp8-attention")
    assert more.rules[:-1] == base.rules
    assert set(more.rules[-1].action) == {Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.ATTENTION_OUTPUT}
    assert [more.origin(index) for index in (0, len(more.rules) - 1)] == ["fp8 rule 1", "fp8-attention rule 1"]


def test_an_alias_loads_the_preset_under_its_real_name() -> None:
    assert load_recipe("int4-weight-only") is load_recipe("int4-group")
    assert load_recipe("int4-weight-only").name == "int4-group"


def test_int4_group_searches_scales_by_weight_error() -> None:
    wanted = load_recipe("int4-group").rules[0].action[Slot.WEIGHT]
    assert (wanted.format, wanted.observer) == (FORMATS["int4-group128"], ObserverSpec("mse"))


def test_the_steps_of_a_file_replace_those_of_the_recipe_that_it_extends(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("extends: int8\nsteps: [{smoothquant: {alpha: 0.7}, select: '*.fc1'}, gptq]\n")
    step, gptq = load_recipe(base).steps
    assert (step.options.alpha, step.select, gptq.name) == (0.7, ("*.fc1",), "gptq")
    (tmp_path / "same.yaml").write_text("extends: base.yaml\n")
    (tmp_path / "none.yaml").write_text("extends: base.yaml\nsteps: []\n")
    assert load_recipe(tmp_path / "same.yaml").steps == (step, gptq)
    assert load_recipe(tmp_path / "none.yaml").steps == ()
    assert read(load_recipe(base).to_yaml()) == load_recipe(base)


def test_a_recipe_loads_as_itself() -> None:
    recipe = Recipe("mine", ())
    assert load_recipe(recipe) is recipe


def test_an_unknown_preset_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(
        UserError, match=r"unknown recipe 'fp8-atention': did you mean 'fp8-attention'\?  presets are .*\bfp8,"
    ):
        load_recipe("fp8-atention")
    with pytest.raises(UserError, match="did you mean 'int4-weight-only'"):
        load_recipe("int4-weightonly")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe 'none/mine.yaml': No such file or directory"):
        load_recipe("none/mine.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(
        UserError, match=r"binary.yaml: a recipe is a text file in UTF-8 \(invalid start byte at byte 6\)"
    ):
        load_recipe(path)


def test_a_file_without_a_name_is_called_after_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n  - select: '*'\n    scheme: {weight: int8-channel}\n")
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    assert recipe.origin(0) == f"mine rule 1 ({path}:2)"


def test_a_file_may_extend_a_preset_or_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: int8\ncalibration: {samples: 7}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nrules: [{select: '*.fc1', leave: hurts}]\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.rules == (*load_recipe("int8").rules, Rule(("*.fc1",), Leave("hurts")))
    assert recipe.calibration.samples == 7


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="more than 8 recipes extend each other in turn"):
        load_recipe(tmp_path / "a.yaml")


def test_a_whole_file() -> None:
    recipe = read(
        """
name: mine
description: all of it
rules:
  - select: ["operation:linear", "type:Conv1d"]
    scheme:
      weight: e4m3-channel
      input: {format: e4m3-tensor, observer: percentile, percentile: 99.9}
      output: {format: int8-tensor, dynamic: true}
  - select: "*patch_embedding*"
    leave: true
  - select: "*.router"
    leave: decides which experts run
    optional: true
calibration: {observer: entropy, samples: 64, batch_size: 8}
"""
    )
    first, second, third = recipe.rules
    assert first.select == ("operation:linear", "type:Conv1d")
    assert first.action == {
        Slot.WEIGHT: slot_rule(Slot.WEIGHT, "e4m3-channel"),
        Slot.INPUT: slot_rule(Slot.INPUT, "e4m3-tensor", observer=ObserverSpec("percentile", 99.9)),
        Slot.OUTPUT: slot_rule(Slot.OUTPUT, "int8-tensor", dynamic=True),
    }
    assert (second.action, third.action, third.is_optional) == (Leave(), Leave("decides which experts run"), True)
    assert recipe.calibration == Calibration(ObserverSpec("entropy"), 64, 8)
    assert read(recipe.to_yaml()) == recipe


def test_a_format_may_be_written_out() -> None:
    odd = TensorFormat(FORMATS["int4-group32"].element, PerGroup(25), scale=PLAIN_FP32)
    recipe = Recipe("odd", ()).quantize("*", weight=odd)
    assert read(recipe.to_yaml()) == recipe


RULE = "rules:\n  - select: '*'\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "the file is empty"),
        ("- fp8\n", 1, "a recipe is a mapping with the fields name, description,"),
        ("name: a\n", 1, "a recipe without rules quantizes nothing: add a rule, or 'extends: fp8'"),
        ("name: a\nrulse: []\n", 2, "unknown field 'rulse' in the recipe: did you mean 'rules'?"),
        (
            "rules:\n  - selct: x\n    leave: true\n",
            2,
            "unknown field 'selct' in a rule: did you mean 'select'?  fields are select, scheme, leave, optional",
        ),
        ("rules:\n  - leave: true\n", 2, "a rule has no 'select'"),
        ("rules:\n  - select: []\n    leave: true\n", 2, "a rule has an empty 'select'"),
        ("rules: 4\n", 1, "rules: input should be a valid list, not 4"),
        (RULE, 2, "the rule has neither a scheme nor leave: it needs one of them"),
        (RULE + "    scheme: {weight: int8-channel}\n    leave: true\n", 2, "the rule has both a scheme"),
        (RULE + "    leave: no\n", 3, "'leave: false' does nothing"),
        (RULE + "    scheme: {}\n", 2, "a rule with an empty scheme does nothing"),
        (
            RULE + "    scheme:\n      input: e4m3-tensor\n      wieght: int8-channel\n",
            5,
            "unknown slot 'wieght': did you mean 'weight'?  slots are weight, input,",
        ),
        (
            RULE + "    scheme:\n      weight: e4m3-tenso\n",
            4,
            "unknown tensor format 'e4m3-tenso': did you mean e4m3-tensor",
        ),
        (RULE + "    scheme:\n      weight: {format: 3}\n", 4, "format 3 is not a name"),
        (
            RULE + "    scheme:\n      weight:\n        frmat: x\n",
            5,
            "unknown field 'frmat' in the scheme of slot weight: did you mean 'format'?",
        ),
        (
            RULE + "    scheme:\n      weight: e4m3-token\n",
            4,
            "weight cannot be e4m3 per token: tokens are a matter of activations; use per channel",
        ),
        (
            RULE + "    scheme:\n      input: int8-channel\n",
            4,
            "input cannot be int8 per channel: an activation has one scale per tensor",
        ),
        (
            RULE + "    scheme:\n      weight: {format: int8-channel, dynamic: true}\n",
            4,
            "weight: a weight does not change from call to call",
        ),
        (
            RULE + "    scheme:\n      input: {format: int8-token, dynamic: false}\n",
            4,
            "input cannot be int8 per token and static: scales per token are found per call",
        ),
        (
            RULE + "    scheme:\n      input: {format: int8-token, observer: mse}\n",
            4,
            "input: a dynamic range is computed per call and has no observer (mse)",
        ),
        (
            RULE + "    scheme:\n      input: {format: int8-tensor, observer: absmx}\n",
            4,
            "unknown observer 'absmx': did you mean 'absmax'?  observers are absmax, percentile, mse, entropy, unit",
        ),
        (
            RULE + "    scheme:\n      input: {format: int8-tensor, observer: mse, percentile: 99}\n",
            4,
            "percentile 99 belongs to 'observer: percentile', not to mse",
        ),
        (
            "rules:\n  - select: '*'\n    leave: true\n  - select: 're:('\n    leave: true\n",
            4,
            "pattern 're:(' is not a valid regular expression",
        ),
        ("rules:\n  - select: *patch*\n    leave: true\n", 2, "a pattern that begins with * must be quoted"),
        ("name: a\nname: b\n", 2, "'name' is already given in line 1"),
        (
            "name: a\ncalibration:\n  samples: many\n",
            3,
            "calibration.samples: input should be a valid integer, not 'many'",
        ),
        (RULE + "    leave: true\ncalibration: {samples: 0}\n", 4, "calibration samples is 0: it must be"),
        (RULE + "    leave: true\ncalibration: {percentile: 101}\n", 4, "percentile 101 is not between"),
        ("name: !!python/object:os.system x\n", 1, "not YAML: could not determine a constructor"),
        ("name: a\nextends: fp9\n", 2, "cannot extend 'fp9': unknown recipe 'fp9': did you mean 'fp8'?"),
        ("extends: int8\nsteps:\n  - gptq\n  - smoothqant: {}\n", 4, "unknown step 'smoothqant': did you mean"),
        ("extends: int8\nsteps:\n  - smoothquant:\n      alpha: 7\n", 4, "step smoothquant: alpha: input should be"),
        ("extends: int8\nsteps: gptq\n", 2, "steps: input should be a valid list, not 'gptq'"),
        ("extends: int8\ncalibration: {inputs: both}\n", 2, "calibration inputs are auto, quantized, unquantized"),
        ("[" * 5000, None, "nested too deeply for a recipe"),
        ("name: \x00", None, "not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_line(text: str, line: int | None, message: str) -> None:
    place = "mine.yaml: " if line is None else f"mine.yaml, line {line}: "
    assert place in refusal(text)
    assert message in refusal(text).split(place, 1)[1]


def test_several_mistakes_are_told_at_once() -> None:
    assert refusal("nam: a\nrules:\n  - selct: x\n").splitlines() == [
        "mine.yaml, line 3: a rule has no 'select'",
        "mine.yaml, line 3: unknown field 'selct' in a rule: did you mean 'select'?  fields are select, scheme, leave, "
        "optional",
        "mine.yaml, line 1: unknown field 'nam' in the recipe: did you mean 'name'?  fields are name, description, "
        "aliases, extends, rules, steps, calibration",
    ]


def test_leave_appends_and_changes_nothing_else() -> None:
    base = load_recipe("fp8")
    more = base.leave("*patch_embedding*", "*.fc1", why="hurts", origin="--leave")
    assert more.rules == (*base.rules, Rule(("*patch_embedding*", "*.fc1"), Leave("hurts")))
    assert more.origin(len(base.rules)) == "--leave"
    assert load_recipe("fp8") == base


def test_leave_refuses_a_bad_pattern_at_once() -> None:
    with pytest.raises(UserError, match="not a valid regular expression"):
        load_recipe("fp8").leave("re:(")


def test_with_observer_changes_the_default_only() -> None:
    recipe = load_recipe("int4-group").with_observer("percentile", 99.9)
    assert recipe.calibration.observer == ObserverSpec("percentile", 99.9)
    assert recipe.rules == load_recipe("int4-group").rules
    with pytest.raises(UserError, match="unknown observer 'median'"):
        recipe.with_observer("median")


def test_the_default_observer_is_for_static_activations() -> None:
    recipe = Recipe("mine", ()).with_observer("mse")
    observers = {
        "static": recipe.quantizer(Slot.INPUT, slot_rule(Slot.INPUT, "int8-tensor")).observer.name,
        "dynamic": recipe.quantizer(Slot.INPUT, slot_rule(Slot.INPUT, "int8-token")).observer.name,
        "weight": recipe.quantizer(Slot.WEIGHT, slot_rule(Slot.WEIGHT, "int8-channel")).observer.name,
    }
    assert observers == {"static": "mse", "dynamic": "absmax", "weight": "absmax"}


TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=20)
PATTERNS = st.text(alphabet="ab.*?_019", min_size=1, max_size=8).filter(lambda text: text.strip())
SCHEMES = st.fixed_dictionaries(
    {Slot.WEIGHT: st.sampled_from(["int8-channel", "e4m3-tensor", "int4-group32-asymmetric"])},
    optional={Slot.INPUT: st.sampled_from(["int8-tensor", "e4m3-token"]), Slot.OUTPUT: st.just("e5m2-tensor")},
).map(lambda formats: {slot: slot_rule(slot, name) for slot, name in formats.items()})
RULES = st.builds(
    Rule,
    st.lists(PATTERNS, min_size=1, max_size=3).map(tuple),
    st.one_of(SCHEMES, st.builds(Leave, TEXT)),
    st.booleans(),
)
CALIBRATIONS = st.builds(
    Calibration,
    st.builds(ObserverSpec, st.sampled_from(OBSERVERS), st.floats(0.1, 100)),
    st.integers(1, 10**6),
    st.integers(1, 10**4),
)


@given(st.builds(Recipe, TEXT.filter(bool), st.lists(RULES, min_size=1, max_size=4).map(tuple), TEXT, CALIBRATIONS))
def test_every_recipe_reads_back_from_its_own_yaml(recipe: Recipe) -> None:
    assert read(recipe.to_yaml()) == recipe


def test_the_format_that_the_documentation_writes_out_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs/formats/tensor-formats.md").read_text(encoding="utf-8")
    block = page.partition("```yaml\n")[2].partition("```")[0]
    indented = "".join(f"      {line}\n" for line in block.splitlines())
    recipe = read(f"rules:\n  - select: operation:linear\n    scheme:\n{indented}")
    action = recipe.rules[0].action
    assert not isinstance(action, Leave)
    assert action[Slot.WEIGHT].format.element.values[1] == pytest.approx(-0.333)
    assert read(recipe.to_yaml()) == recipe
