"""The quality table of algorithms: its rows exist, and differences are paired within a draw."""

import sys

from benchmarks.peers import octavo_cells
from benchmarks.quality.algorithms import LIBRARIES, METRICS, Cells, Subject, key_of, methods, table

import octavo


def test_every_row_has_octavos_choice_and_its_plain_preset():
    for preset in octavo_cells.FORMATS.values():
        assert not octavo.load_recipe(preset).steps
        assert octavo.load_recipe(f"best:{preset}").steps


def test_every_method_of_a_peer_belongs_to_a_row():
    for library in LIBRARIES:
        rows = {row for row in octavo_cells.FORMATS if methods(library, row)}
        assert rows >= {"int8", "int4-group128", "nvfp4", "mxfp4"}


def cells(*cosines):
    return [{"values": {"cosine": cosine}} for cosine in cosines]


def test_a_peer_counts_as_ahead_beyond_one_standard_error_of_paired_differences(tmp_path):
    subject = Subject("encoder", "", tmp_path, (), METRICS["encoder"])
    found = {"octavo best": cells(0.90, 0.95, 0.99), "octavo plain": cells(0.8, 0.8, 0.8)}
    # the spread over draws is large, that of the differences small
    found["modelopt int8 smoothquant"] = cells(0.91, 0.95, 0.98)
    found["torchao int8 smoothquant"] = cells(0.91, 0.96, 1.0)
    found["torchao int8 other"] = cells(0.5, 0.5, 0.5)
    found["llmcompressor int8 gptq"] = [{"failed": "RuntimeError: no CUDA"}]
    _, _, row = table(subject, {"int8": found}).strip().splitlines()
    *_, near, far, failed = (cell.strip() for cell in row.strip("| ").split("|"))
    assert near == "smoothquant 0.9467 (+0 ± 0.0058)"
    assert far.startswith("smoothquant 0.9567 (-0.01 ±")
    assert far.endswith("**behind**")
    assert failed == "needs CUDA"


def test_finished_cells_are_not_made_again_and_crashes_are_not_kept(tmp_path):
    draw = tmp_path / "draw.jsonl"
    draw.write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")  # no model
    subject = Subject("encoder", str(tmp_path), draw, (draw,), METRICS["encoder"])
    known = Cells(tmp_path, {"octavo": sys.executable})
    (crashed,) = known.get(subject, "octavo", "int8 plain", [0])
    assert "octavo_cells" in crashed["failed"]
    assert known.kept() == {}
    known.change(lambda kept: kept | {key_of(subject, "octavo", "int8 plain", 0): cells(0.5)[0]})
    assert known.get(subject, "octavo", "int8 plain", [0]) == cells(0.5)
    known.forget("int8")
    assert known.kept() == {}
