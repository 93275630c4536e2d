"""Patterns mean what they say, and a pattern that matches nothing is answered with one that does."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made_facts import attention, clip, encoder, linear, norm
from octavo.errors import UserError
from octavo.spec.facts import SiteFacts, Slot
from octavo.spec.select import parse_pattern, quantizer_name
from octavo.spec.suggest import no_match_message, suggest

NAMES = st.text(alphabet="abc.019_#", max_size=12)
FC1 = linear("vision_model.encoder.layers.0.mlp.fc1", 8, 4)


def matches(text: str, site: SiteFacts) -> bool:
    return parse_pattern(text).matches(site)


@pytest.mark.parametrize(
    "text",
    [
        r"*",
        r"*fc1",
        r"*.mlp.*",
        r"vision_model.encoder.layers.0.mlp.fc1",
        r"*layers.?.mlp*",
        r"*fc[1-3]",
        r"*fc[!2]",
        r"*.{fc1,fc2}",
        r"*layers.{0..11}.*",
        r"*layers.{0,4..6}.mlp.fc1",
        r"re:.*layers\.\d+\.mlp\.fc1",
        r"type:Linear",
        r"type:Mod*",
        r"operation:linear",
        r"operation:lin*",
    ],
)
def test_what_matches(text: str) -> None:
    assert parse_pattern(text).matches_site(FC1)


@pytest.mark.parametrize(
    "text",
    [
        r"*FC1",
        r"fc1",
        r"*layers.{1..11}.mlp.fc1",
        r"*.{fc2,fc3}",
        r"*fc[!1]",
        r"re:layers\.0",
        r"type:linear",
        r"type:Lin",
        r"operation:conv",
    ],
)
def test_what_does_not_match(text: str) -> None:
    assert not matches(text, FC1)


@given(NAMES, st.lists(st.sampled_from(["*", "?", "[ab]", "[!a]", "[0-9]", "a", ".", "b", "_", "1"]), max_size=6))
def test_globs_agree_with_fnmatch(name: str, pieces: list[str]) -> None:
    glob = "".join(pieces)
    if glob.strip():
        assert parse_pattern(glob).matches_site(linear(name, 2, 2)) == fnmatch.fnmatchcase(name, glob)


@given(NAMES.filter(lambda name: name.strip()))
def test_a_name_is_a_pattern_for_itself(name: str) -> None:
    assert parse_pattern(name).matches_site(linear(name, 2, 2))


def test_a_base_class_selects_its_subclasses() -> None:
    site = SiteFacts("head", "linear", "MyLinear", (Slot.WEIGHT,), base_types=("Linear", "Module"))
    assert matches("type:Linear", site)


def test_a_site_pattern_means_all_its_slots() -> None:
    assert parse_pattern("*fc1").matching_slots(FC1) == FC1.slots


def test_a_quantizer_pattern_means_one_slot() -> None:
    assert parse_pattern("*.input_quantizer").matching_slots(FC1) == (Slot.INPUT,)
    assert parse_pattern("*layers.0*weight_quantizer").matching_slots(FC1) == (Slot.WEIGHT,)
    assert not parse_pattern("*q_bmm_quantizer").matching_slots(FC1)


def test_a_parameter_means_its_quantizer() -> None:
    assert parse_pattern("*.fc1.weight").matching_slots(FC1) == (Slot.WEIGHT,)
    assert parse_pattern("*.fc1.bias").matching_slots(FC1) == ()
    assert matches("*.fc1.bias", FC1)


def test_the_shared_weight_of_a_tied_head_has_the_name_of_the_head_too() -> None:
    assert matches("lm_head.weight", linear("lm_head", 4, 4, tied_to="embed"))


@pytest.mark.parametrize("text", ["*softmax_quantizer", "*p_bmm_quantizer"])
def test_the_softmax_quantizer_has_two_names(text: str) -> None:
    assert parse_pattern(text).matching_slots(attention("a.self_attn", 8)) == (Slot.SOFTMAX,)


def test_quantizer_names_of_the_model_itself_have_no_leading_dot() -> None:
    assert quantizer_name("", Slot.WEIGHT) == "weight_quantizer"
    assert parse_pattern("weight_quantizer").matching_slots(linear("", 2, 2)) == (Slot.WEIGHT,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "an empty pattern selects nothing"),
        ("re:layers.(3", "pattern 're:layers.(3' is not a valid regular expression: missing ), unterminated subpattern "
                         "at position 7 of 'layers.(3'"),
        ("class:Linear", "pattern 'class:Linear': unknown kind 'class:'; kinds are re:"),
        ("h.{3..1}.fc", "pattern 'h.{3..1}.fc': {3..1} is not a range"),
        ("h.{0..99999999}.fc", "is not a range of at most 10000 numbers"),
        ("*fc[z-a]", "pattern '*fc[z-a]' is not a valid regular expression: bad character range z-a"),
    ],
)  # fmt: skip
def test_a_bad_pattern_is_explained(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("*patch_embeding*", "*patch_embedding*"),
        ("visual_projction", "visual_projection"),
        ("*q_bm_quantizer", "*q_bmm_quantizer"),
        ("*.mpl.fc1", "*.mlp.fc1"),
        ("type:linear", "type:Linear"),
        ("type:Conv3d", "type:Conv2d"),
        ("operation:convolution", "operation:conv"),
        ("re:.*fc11", "re:.*fc1"),
        ("vision_model", "vision_model.*"),
        ("*layers.9.mlp*", "*layers.3.mlp*"),
    ],
)
def test_the_nearest_pattern_is_suggested_first(text: str, nearest: str) -> None:
    assert suggest(parse_pattern(text), clip().sites)[0] == nearest


@given(st.text(alphabet="vison_m.odelfc12*?{}[],layrs", min_size=1, max_size=20))
def test_whatever_is_suggested_matches_something(text: str) -> None:
    sites = clip().sites
    try:
        pattern = parse_pattern(text)
    except UserError:
        return
    for near in suggest(pattern, sites):
        assert any(matches(near, site) for site in sites), near


def test_the_message_names_the_pattern_its_origin_and_the_nearest() -> None:
    message = no_match_message(parse_pattern("*pooler.dens"), encoder().sites, "mine rule 2 (mine.yaml:7)")
    assert message.startswith("pattern '*pooler.dens' (mine rule 2 (mine.yaml:7)) matches no layer and no quantizer")
    assert "did you mean '*pooler.dense'" in message


def test_without_anything_near_the_message_shows_what_there_is() -> None:
    message = no_match_message(parse_pattern("zzzzzz"), [norm("a.ln", 4), linear("b.fc", 4, 4)], "--leave")
    assert message.endswith("layers here are for instance 'a.ln' or 'b.fc'; `octavo plan` lists them all")
