"""Each kind of model that people have, through every verb of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import octavo as library
from cli.running import fine, octavo
from e2e.cases import CASES, Case
from octavo.spec.records import RunRecord, check_json_object

pytestmark = pytest.mark.usefixtures("_on_the_shelf")
Finished = Callable[[str], Path]

ATTENTION = {"clip": 5, "vit": 2, "llama": 2, "bart": 4, "tower_of_mine:build": 1}
"""Attention calls of the models that are quantized with ``fp8-attention``, counted by hand."""


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, saved: Callable[[str], str]) -> Case:
    saved(request.param.model)
    return request.param


def test_plan_needs_no_data(case: Case) -> None:
    outcome = fine("plan", case.model, "--recipe", case.recipe, "--json")
    check_json_object(outcome.json)
    assert outcome.json["recipe"] == case.recipe
    assert 0 < outcome.json["plan"]["parameters_covered"] <= 1
    assert set(outcome.json["seconds"]) == {"load", "plan"}


def test_quantize_prints_one_object_that_keeps_the_contract(case: Case, tmp_path: Path) -> None:
    words = ("--recipe", case.recipe, "--data", case.data, *case.task_options)
    outcome = fine("quantize", case.model, *words, "--out", tmp_path / "run", "--layout", "modelopt", "--json")
    check_json_object(outcome.json)
    assert outcome.json["output"] == str(tmp_path / "run")
    assert set(outcome.json["seconds"]) == {"load", "plan", "calibrate", "evaluate", "export"}
    for key in case.metrics:
        task, metric = key.split(".")
        values = outcome.json["metrics"][task][metric]
        assert values["quantized"] is not None, key
        assert values["baseline"] is not None or metric == "sqnr_db", key
    assert 0 < outcome.json["plan"]["macs_covered"] <= 1
    assert outcome.json["bytes"]["after"] < outcome.json["bytes"]["before"]


def test_the_bytes_in_the_record_are_those_in_the_files(case: Case, finished: Finished) -> None:
    record = RunRecord.from_json((finished(case.model) / "run.json").read_text())
    stored = 0
    for path in finished(case.model).glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            stored += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert record.bytes_after == stored


def test_evaluate_says_the_same_of_the_run(case: Case, finished: Finished) -> None:
    labelled = [task for task in case.tasks if "fidelity" not in task]
    if not labelled:
        pytest.skip("fidelity alone needs the unquantized model")
    record = RunRecord.from_json((finished(case.model) / "run.json").read_text())
    words = [word for task in labelled for word in ("--task", task)]
    outcome = fine("evaluate", finished(case.model), *words, "--json")
    check_json_object(outcome.json)
    assert outcome.json["output"] is None
    for task, metrics in outcome.json["metrics"].items():
        for metric, values in metrics.items():
            assert values["quantized"] == pytest.approx(record.metrics[task][metric].quantized, rel=1e-6)
            assert values["baseline"] is None


def test_evaluate_of_the_model_gives_the_baseline(case: Case, finished: Finished) -> None:
    labelled = [task for task in case.tasks if "fidelity" not in task]
    if not labelled:
        pytest.skip("fidelity alone needs the unquantized model")
    record = RunRecord.from_json((finished(case.model) / "run.json").read_text())
    words = [word for task in labelled for word in ("--task", task)]
    outcome = fine("evaluate", case.model, *words, "--json")
    check_json_object(outcome.json)
    for task, metrics in outcome.json["metrics"].items():
        for metric, values in metrics.items():
            assert values["baseline"] == pytest.approx(record.metrics[task][metric].baseline, rel=1e-6)


@pytest.mark.parametrize("place", ["", "modelopt"])
def test_the_files_mean_what_was_simulated(case: Case, finished: Finished, place: str) -> None:
    run = finished(case.model)
    outcome = fine("verify", run / place, "--run", run, "--data", case.data, "--json")
    assert outcome.json["agrees"]
    assert outcome.json["worst_output"] == 0
    assert outcome.json["num_batches"] > 0
    assert outcome.json["num_weights"] > 0


def test_a_later_export_gives_the_same_bytes(case: Case, finished: Finished, tmp_path: Path) -> None:
    run = finished(case.model)
    fine("export", run, "--layout", "modelopt", "--out", tmp_path / "later", "--json")
    assert _files(tmp_path / "later") == _files(run / "modelopt")


def test_inspect_lists_weights_and_finds_nothing_suspicious(case: Case, finished: Finished) -> None:
    run = finished(case.model)
    for place, layout in ((run, "run"), (run / "modelopt", "modelopt")):
        found = fine("inspect", place, "--json").json
        assert found["layout"] == layout
        assert found["concerns"] == []
        assert any(row["kind"] == "weight" for row in found["rows"])


def test_sensitivity_ranks_every_quantizer(case: Case, finished: Finished) -> None:
    record = RunRecord.from_json((finished(case.model) / "run.json").read_text())
    words = ("--recipe", case.recipe, "--data", case.data, "--judge-samples", "2")
    outcome = fine("sensitivity", case.model, *words, "--only", "*weight_quantizer", "--json")
    check_json_object(outcome.json)
    rows = outcome.json["sensitivity"]
    weights = [layer for layer in record.layers if "weight" in layer.quantizers]
    assert len(rows) == len(weights)
    costs = [row["cost"] for row in rows]
    assert costs == sorted(costs, reverse=True)
    assert {row["format"] for row in rows} == {layer.quantizers["weight"] for layer in weights}


@pytest.mark.parametrize("name", ATTENTION)
def test_every_attention_call_has_its_quantizers(name: str, finished: Finished) -> None:
    record = RunRecord.from_json((finished(name) / "run.json").read_text())
    calls = [layer for layer in record.layers if layer.operation == "attention"]
    assert len(calls) == ATTENTION[name]
    for call in calls:
        assert set(call.quantizers) == {"query", "key", "value", "attention_output"}


def test_a_run_holds_what_the_model_needs_and_no_pickle(case: Case, finished: Finished, shelf: Path) -> None:
    run = finished(case.model)
    for place in (run, run / "modelopt"):
        assert {path.suffix for path in place.rglob("*") if path.is_file()} <= {
            ".json",
            ".safetensors",
            ".yaml",
            ".txt",
        }
    if ":" in case.model:
        return
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "modules.json"):
        assert (run / "modelopt" / name).is_file() == (shelf / case.model / name).is_file()


def test_pooling_and_dense_of_a_sentence_encoder_come_along(finished: Finished, shelf: Path) -> None:
    for place in (finished("sentence_encoder"), finished("sentence_encoder") / "modelopt"):
        for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
            assert (place / name).read_bytes() == (shelf / "sentence_encoder" / name).read_bytes()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_weights_of_the_checkpoint_are_near_those_of_the_model(name: str, finished: Finished, shelf: Path) -> None:
    """Read with torch and safetensors alone: codes times scale."""
    ours = load_file(finished(name) / "modelopt" / "model.safetensors")
    original = load_file(shelf / name / "model.safetensors")
    quantized = [key for key, value in ours.items() if value.dtype == torch.float8_e4m3fn]
    assert quantized
    for key in quantized:
        scale = ours[f"{key}_scale"].float()
        meant = ours[key].float() * (scale.reshape(-1, 1) if scale.ndim else scale)
        assert (meant - original[key]).norm() / original[key].norm() < 0.04


@pytest.mark.parametrize("name", ["bert", "gpt2", "tower_of_mine:build"])
def test_a_run_loads_in_python_with_the_same_outputs(name: str, finished: Finished, shelf: Path) -> None:
    """Quantized anew in this process, and read back from the run: every bit the same."""
    case = CASES[name]
    order = ("--recipe", case.recipe, "--data", case.data)
    fine("quantize", case.model, *order, "--out", shelf / "again", "--quiet")
    first, second = library.load(finished(name)), library.load(shelf / "again")
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    for (key, ours), (other_key, theirs) in pairs:
        assert key == other_key
        assert torch.equal(ours, theirs), key


def test_leaving_the_worst_out_does_what_the_hint_says(finished: Finished, tmp_path: Path) -> None:
    case = CASES["clip"]
    few = ("--only", "text_model.*", "--judge-samples", 2)
    shown = fine("sensitivity", "clip", "--recipe", case.recipe, "--data", case.data, "--top", 2, *few)
    hint = next(line for line in shown.out.splitlines() if line.startswith("to leave them out:"))
    patterns = hint.split("'")[1::2]
    words = [word for pattern in patterns for word in ("--leave", pattern)]
    outcome = fine("plan", "clip", "--recipe", case.recipe, *words, "--json")
    before = fine("plan", "clip", "--recipe", case.recipe, "--json")
    assert outcome.json["leave"] == patterns
    assert outcome.json["plan"]["num_quantizers"] == before.json["plan"]["num_quantizers"] - 2


def test_the_same_input_and_seed_give_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    case = CASES["clip"]
    again = case.quantize(tmp_path / "again")
    first, second = _files(finished("clip")), _files(again)
    records = [json.loads(files.pop("run.json")) for files in (first, second)]
    assert first == second
    for record in records:
        for key in ("seconds", "peak_memory_bytes", "output"):
            record.pop(key)
    assert records[0] == records[1]


def test_another_seed_draws_other_samples(tmp_path: Path) -> None:
    case = CASES["bert"]
    scales = []
    for seed in (0, 0, 1):
        out = tmp_path / f"run-{len(scales)}"
        words = ("--recipe", "fp8", "--data", case.data, "--samples", 3, "--seed", seed)
        fine("quantize", "bert", *words, "--out", out, "--quiet")
        stored = load_file(out / "quantized.safetensors")
        found = [value.float().numpy().ravel() for name, value in sorted(stored.items()) if "input_quantizer" in name]
        scales.append(np.concatenate(found))
    assert np.array_equal(scales[0], scales[1])
    assert not np.array_equal(scales[0], scales[2])


def test_a_run_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    for recipe in ("int8-weight-only", "fp8-dynamic"):
        fine("quantize", "bert", "--recipe", recipe, "--out", tmp_path / "run", "--layout", "modelopt", "--quiet")
    assert fine("inspect", tmp_path / "run", "--json").json["facts"]["recipe"] == "fp8-dynamic"
    assert octavo("verify", tmp_path / "run" / "modelopt", "--run", tmp_path / "run").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
