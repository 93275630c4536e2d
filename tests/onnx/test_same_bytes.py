"""The same graph, recipe, data and seed give the same bytes, in any process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from hand_made_graphs import add, empty, finish, initializer

pytestmark = pytest.mark.slow
WIDTH = 64
QUANTIZE = """
import sys
from pathlib import Path
from octavo import pipeline
from octavo.sources import open_data, open_model
from octavo.spec.recipe import read_recipe

place, recipe = Path(sys.argv[1]), sys.argv[2]
data = [{"x": batch["x"][None].reshape(-1, 64)} for batch in open_data(place.parent / "d.npz").samples]
run = pipeline.quantize(open_model(place.parent / "g.onnx"), read_recipe(recipe, "r.yaml"), data, target=sys.argv[3])
pipeline.save(run, place / "run")
pipeline.export(place / "run", place / "onnx", layout="onnx")
pipeline.export_graph(run, place / "q.onnx")
"""


def graph(path: Path) -> None:
    """Norm, attention of one head, and two products behind a ReLU, twice; everything twice is a set's temptation."""
    rng = np.random.default_rng(0)
    model = empty(("x", ["n", WIDTH]))
    g, value = model.graph, model.graph.inputs[0]
    for index in range(2):
        ones = initializer(g, f"{index}.norm.weight", np.ones(WIDTH, np.float32))
        normed = add(g, "LayerNormalization", value, ones, axis=-1)
        made = {
            part: add(g, "MatMul", normed, initializer(g, f"{index}.{part}.weight", _random(rng, WIDTH, WIDTH)))
            for part in "qkv"
        }
        scores = add(g, "MatMul", made["q"], add(g, "Transpose", made["k"], perm=[1, 0]))
        mixed = add(g, "MatMul", add(g, "Softmax", scores, axis=-1), made["v"])
        value = add(g, "Add", value, mixed)
        up = add(g, "Relu", add(g, "MatMul", value, initializer(g, f"{index}.up.weight", _random(rng, WIDTH, 128))))
        value = add(
            g, "Add", value, add(g, "MatMul", up, initializer(g, f"{index}.down.weight", _random(rng, 128, WIDTH)))
        )
    finish(model, value)
    model.opset_imports.pop("octavo")
    ir.save(model, path)


def _random(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) / 8).astype(np.float32)


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("extends: int8", "onnxruntime-cpu"), ("extends: fp8-attention\nsteps: [{smoothquant: {alpha: 0.5}}, gptq]", "")],
)
def test_two_processes_write_the_same_bytes(tmp_path: Path, recipe: str, target: str) -> None:
    graph(tmp_path / "g.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(1).standard_normal((32, WIDTH)).astype(np.float32))
    for name, seed in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", QUANTIZE, str(tmp_path / name), recipe, target]
        done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second = (content(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert {"q.onnx", "onnx/model.onnx", "run/graph.onnx", "run/plan.json"} <= first.keys()
    different = [name for name in first if first[name] != second[name]]
    assert not set(different) - {"run/run.json"}, "only the record, which says when and how long, may differ"


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}
