"""``--json`` is a contract: these keys, these types, documented, and valid JSON whatever was measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made_facts import clip
from octavo.errors import UserError
from octavo.spec.recipe import load_recipe
from octavo.spec.records import (
    BlockRecord,
    MetricRecord,
    RunRecord,
    SensitivityRecord,
    StepRecord,
    check_json_object,
    runs_to_json_object,
)
from octavo.spec.resolve import resolve

PLAN = resolve(load_recipe("fp8-attention").leave("*patch_embedding*"), clip())
RECORD = dataclasses.replace(
    RunRecord.of_plan(PLAN, version="0.1", leave=["*patch_embedding*"]),
    environment={"python": "3.12"},
    metrics={"retrieval": {"r_at_1": MetricRecord(baseline=0.712, quantized=0.704, standard_error=0.003)}},
    sensitivity=(SensitivityRecord(quantizer="a.input_quantizer", metric="cosine", cost=0.1),),
    seconds={"load": 1.25, "plan": 0.5},
    peak_memory_bytes=10**9,
    output="OUT",
    blocks=(BlockRecord(name="h.0", error=0.01, steps=[StepRecord(name="gptq", error=0.005, seconds=1.0)]),),
)


def test_the_object_has_what_the_contract_names() -> None:
    found = RECORD.to_json_object()
    assert found["schema"] == "octavo.run/1"
    assert (found["model"], found["recipe"], found["leave"]) == ("demo:clip", "fp8-attention", ["*patch_embedding*"])
    assert found["plan"]["parameters_covered"] == PLAN.parameters_covered
    assert found["plan"]["macs_covered"] == PLAN.macs_covered
    assert found["bytes"] == {"before": PLAN.bytes_before, "after": PLAN.bytes_after}
    assert found["metrics"]["retrieval"]["r_at_1"] == {"baseline": 0.712, "quantized": 0.704, "standard_error": 0.003}
    assert found["seconds"] == {"load": 1.25, "plan": 0.5}
    assert (found["peak_memory_bytes"], found["warnings"], found["output"]) == (10**9, [], "OUT")


def test_every_key_is_documented_and_every_documented_key_is_there() -> None:
    page = Path(__file__).parents[2] / "docs" / "json.md"
    table = page.read_text(encoding="utf-8").split("| key | type | means |")[1].split("\n\n")[0]
    documented = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert {name.split(".")[0].removesuffix("[]") for name in documented} == set(RECORD.to_json_object())


def test_a_record_keeps_the_contract_before_anything_ran() -> None:
    check_json_object(RunRecord("m").to_json_object())
    assert RunRecord("m").to_json_object()["plan"] == {
        "parameters_covered": None,
        "macs_covered": None,
        "num_quantizers": 0,
        "coverage": [],
    }


def test_a_record_reads_back_from_its_file() -> None:
    assert RunRecord.from_json(RECORD.to_json()) == RECORD
    assert [layer.name for layer in RECORD.layers] == [site.name for site in clip().sites]


def test_what_a_door_could_not_see_is_a_warning() -> None:
    facts = dataclasses.replace(clip(), notes=("no sample: attention was not traced",))
    assert RunRecord.of_plan(resolve(load_recipe("fp8"), facts)).warnings == ("no sample: attention was not traced",)


@given(st.none() | st.floats(), st.none() | st.floats())
def test_it_is_valid_json_whatever_was_measured(baseline: float | None, quantized: float | None) -> None:
    metrics = {"perplexity": {"perplexity": MetricRecord(baseline=baseline, quantized=quantized)}}
    found = dataclasses.replace(RECORD, metrics=metrics).to_json_object()
    json.dumps(found, allow_nan=False)
    check_json_object(found)
    if quantized is not None and not math.isfinite(quantized):
        assert found["metrics"]["perplexity"]["perplexity"]["quantized"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "octavo.run/2"}, "a record of schema 'octavo.run/2': this octavo reads 'octavo.run/1'"),
        ({"model": 3}, "not a run record: model: Input should be a valid string"),
        ({"plan": {"parameters_covered": 1.5}}, "plan.parameters_covered: Input should be less than or equal to 1"),
        ({"bytes": {"before": "many"}}, "bytes.before: Input should be a valid integer"),
        (
            {"metrics": {"retrieval": {"r_at_1": {"baseline": "0.7"}}}},
            "metrics.retrieval.r_at_1.baseline: Input should",
        ),
    ],
)
def test_an_object_that_breaks_the_contract_is_refused_by_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_json_object(RECORD.to_json_object() | change)


@pytest.mark.parametrize("key", sorted(RECORD.to_json_object()))
def test_no_key_may_be_missing(key: str) -> None:
    found = RECORD.to_json_object()
    del found[key]
    with pytest.raises(UserError, match="record"):
        check_json_object(found)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_what_is_not_a_record_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="record"):
        RunRecord.from_json(text)


def test_several_runs_are_one_object() -> None:
    found = runs_to_json_object({"everywhere": RECORD, "patch embedding left out": RECORD})
    assert found["schema"] == "octavo.runs/1"
    assert [run["name"] for run in found["runs"]] == ["everywhere", "patch embedding left out"]
    for run in found["runs"]:
        check_json_object(run)


def test_the_change_of_a_metric_needs_both_values() -> None:
    assert MetricRecord(baseline=0.5, quantized=0.25).change == -0.25
    assert MetricRecord(quantized=0.25).change is None
