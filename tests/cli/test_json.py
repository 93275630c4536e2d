"""``--json`` is a contract: one object on standard output, the documented keys, the exit status."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import octavo
from cli.running import fine, process, refused
from cli.running import octavo as run_octavo
from octavo.spec.records import check_json_object

pytestmark = pytest.mark.usefixtures("_on_the_bench")
DOCUMENT = (Path(octavo.__file__).parents[2] / "docs" / "json.md").read_text()

COMMANDS = {
    "plan": ("plan", "bert", "--recipe", "int8"),
    "quantize": ("quantize", "bert", "--recipe", "fp8-dynamic", "--task", "fidelity:texts.jsonl"),
    "sensitivity": ("sensitivity", "bert", "--recipe", "fp8-dynamic", "--data", "texts.jsonl", "--only", "*.query"),
    "evaluate": ("evaluate", "run", "--task", "retrieval:pairs.jsonl"),
    "verify": ("verify", "run/modelopt", "--run", "run", "--data", "pairs.jsonl"),
    "inspect": ("inspect", "run/modelopt"),
    "export": ("export", "run", "--layout", "modelopt", "--out", "exported"),
    "convert": ("convert", "run", "--to", "int8-channel", "--out", "converted"),
    "recipes": ("recipes",),
    "formats": ("formats",),
}
SCHEMAS = {
    "octavo.run/1": ("plan", "quantize", "sensitivity", "evaluate"),
    "octavo.verification/1": ("verify",),
    "octavo.inspection/1": ("inspect",),
    "octavo.export/1": ("export",),
    "octavo.conversion/1": ("convert",),
    "octavo.recipes/1": ("recipes",),
    "octavo.formats/1": ("formats",),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_standard_output_is_one_object_with_the_documented_keys(verb: str, run: Path) -> None:
    found = fine(*COMMANDS[verb], "--json").json
    schema = next(name for name, verbs in SCHEMAS.items() if verb in verbs)
    assert found["schema"] == schema
    assert set(found) == _documented(schema)


@pytest.mark.parametrize("verb", SCHEMAS["octavo.run/1"])
def test_verbs_about_a_model_share_one_shape(verb: str, run: Path) -> None:
    check_json_object(fine(*COMMANDS[verb], "--json").json)


def test_metrics_are_found_where_the_page_says() -> None:
    tasks = ("--task", "retrieval:pairs.jsonl", "--task", "near=fidelity:texts.jsonl")
    found = fine("quantize", "bert", "--recipe", "fp8-dynamic", *tasks, "--json").json
    assert 0 <= found["metrics"]["retrieval"]["r_at_1"]["quantized"] <= 1
    assert found["metrics"]["retrieval"]["reverse_r_at_5"]["baseline"] is not None
    assert 0.9 < found["metrics"]["near"]["cosine"]["quantized"] <= 1
    assert found["metrics"]["near"]["sqnr_db"]["baseline"] is None  # infinite: no noise at all
    assert found["recipe"] == "fp8-dynamic"
    assert found["output"] is None


def test_an_alias_is_replaced_by_the_name_of_the_recipe() -> None:
    words = ("plan", "bert", "--recipe", "int4-weight-only", "--leave", "*.pooler.*", "--json")
    assert "in_features=36" in refused(*words[:4])
    assert "matches no layer" in refused(*words)


def test_what_was_left_out_is_told() -> None:
    found = fine("plan", "bert", "--recipe", "fp8", "--leave", "*.query", "--leave", "pooler.*", "--json").json
    assert found["leave"] == ["*.query", "pooler.*"]


def test_tasks_of_one_name_are_refused() -> None:
    words = ("--recipe", "fp8-dynamic", "--task", "retrieval:pairs.jsonl", "--task", "retrieval:plates/plates.jsonl")
    message = refused("quantize", "bert", *words, "--json")
    assert "another task is called 'retrieval' already" in message
    assert "NAME=retrieval:plates/plates.jsonl" in message


def test_what_a_models_own_code_prints_goes_to_standard_error() -> None:
    outcome = fine("plan", "odd_tower:build", "--recipe", "fp8", "--json")
    check_json_object(outcome.json)
    assert "building" in outcome.err


def test_files_that_differ_are_told_as_an_object_with_status_1(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "modelopt", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    outcome = run_octavo("verify", tmp_path / "other", "--run", run, "--json")
    assert outcome.status == 1
    assert outcome.json["agrees"] is False
    assert [entry["name"] for entry in outcome.json["differences"]] == ["pooler.dense.bias"]
    assert outcome.err == f"octavo: {tmp_path / 'other'} does not mean what was simulated\n"


def test_the_process_itself_keeps_to_it(bench: Path) -> None:
    done = process("plan", "odd_tower:build", "--recipe", "fp8", "--json", cwd=bench)
    assert done.returncode == 0
    assert done.stdout.startswith('{\n "schema": "octavo.run/1"')
    assert done.stdout.endswith("}\n")
    assert done.stderr == "building\n"


def _documented(schema: str) -> set[str]:
    """First parts of the keys in the table of ``schema``."""
    section = DOCUMENT.partition(f"## `{schema}`")[2].partition("\n## ")[0]
    assert section, f"docs/json.md has no section on {schema}"
    table = section.partition("| key |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {re.split(r"[.\[]", key)[0] for row in rows for key in re.findall(r"`([^`]+)`", row)}
