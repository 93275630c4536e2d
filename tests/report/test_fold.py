"""What a table prints for repeated layers is a pattern that rules accept, for exactly those layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made_facts import clip, linear
from octavo.report.fold import fold_names
from octavo.spec.select import parse_pattern

PARTS = st.sampled_from(["0", "1", "2", "3", "7", "07", "q_proj", "k_proj", "fc", "mlp", "_proj"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"h.{i}.fc" for i in range(12)], ["h.{0..11}.fc"]),
        (["h.0.fc", "h.2.fc", "h.3.fc", "h.4.fc", "h.6.fc"], ["h.{0,2..4,6}.fc"]),
        (["h.5.fc"], ["h.5.fc"]),
        ([f"h.0.{name}_proj" for name in "qkv"], ["h.0.{q,k,v}_proj"]),
        (["h.0.query", "h.0.key"], ["h.0.{query,key}"]),
        ([f"h.{i}.experts.{j}.w" for i in range(4) for j in range(8)], ["h.{0..3}.experts.{0..7}.w"]),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0"], ["h.0.e.{0,1}", "h.1.e.0"]),
        (["a", "b"], ["a", "b"]),
        ([f"h.{i}.fc.{slot}_quantizer" for i in (0, 1) for slot in ("weight", "input")],
         ["h.{0,1}.fc.{weight,input}_quantizer"]),
    ],
)  # fmt: skip
def test_how_names_fold(names: list[str], folded: list[str]) -> None:
    assert list(fold_names(names)) == folded


@given(st.lists(NAMES, max_size=12, unique=True))
def test_every_name_is_in_one_pattern_that_matches_it(names: list[str]) -> None:
    folded = fold_names(names)
    assert sorted(name for members in folded.values() for name in members) == sorted(names)
    for pattern, members in folded.items():
        matched = [name for name in names if parse_pattern(pattern).matches_site(linear(name, 2, 2))]
        assert sorted(matched) == sorted(members)


def test_a_real_model_folds_to_a_handful() -> None:
    assert len(fold_names([site.name for site in clip().sites])) < 25
