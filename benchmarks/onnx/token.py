"""One token through linear layers of one width, weights quantized: how many times as fast as in fp32?

    python -m benchmarks.onnx.token [--widths 1024 2048 4096] [--recipes int4-group ...] [--rounds 20] [--json]

A chain of square layers without anything between them, as many as fill 128 MB in fp32, so that weights come from memory
as in a real model. The ONNX door quantizes it for ``onnxruntime-cpu`` without data; the files take turns in onnxruntime
on as many threads as torch has, and the best of the rounds counts. *Cosine* is that of a chain's output to fp32's: it
falls with depth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.machine import describe_machine, one_line
from benchmarks.onnx.encoder import cosine, open_session

from octavo import pipeline
from octavo.onnx.fusion import fusion_of
from octavo.sources import open_model

RECIPES = ("int4-group", "int4-group32", "int4-group-asymmetric", "int8-weight-only", "int8-dynamic")
TARGET = "onnxruntime-cpu"
BYTES = 128 << 20


def write_chain(path: Path, width: int) -> None:
    """Layers with normal weights that keep the size of what passes through."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    count = max(1, BYTES // (4 * width * width))
    names = ["x", *(f"h{i}" for i in range(count - 1)), "y"]
    weights = [(rng.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(count)]
    nodes = [helper.make_node("MatMul", [names[i], f"{i}.weight"], [names[i + 1]], name=f"{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "t", width]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(weight, f"{i}.weight") for i, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def compare(width: int, recipes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """fp32 and every recipe at one width."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_chain(place / "fp32.onnx", width)
        rows: list[dict[str, Any]] = [{"width": width, "recipe": "fp32", "kernel": "MatMul"}]
        for recipe in recipes:
            run = pipeline.quantize(open_model(place / "fp32.onnx"), recipe, target=TARGET)
            pipeline.export_graph(run, place / f"{recipe}.onnx")
            kernels = fusion_of(place / f"{recipe}.onnx").kernels
            rows.append({"width": width, "recipe": recipe, "kernel": ", ".join(kernels)})
        sessions = [open_session(place / f"{row['recipe']}.onnx") for row in rows]
        for row in rows:
            row["megabytes"] = (place / f"{row['recipe']}.onnx").stat().st_size / 1e6
        _judge(rows, sessions, width, rounds)
    return rows


def _judge(rows: list[dict[str, Any]], sessions: list[Any], width: int, rounds: int) -> None:
    x = {"x": np.random.default_rng(1).standard_normal((1, 1, width)).astype(np.float32)}
    best = [float("inf")] * len(rows)
    for _ in range(rounds):
        for index, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, x)
            best[index] = min(best[index], time.perf_counter() - start)
    outputs = [session.run(None, x)[0].reshape(1, -1) for session in sessions]
    for row, seconds, output in zip(rows, best, outputs, strict=True):
        row |= {"milliseconds": seconds * 1e3, "speed": best[0] / seconds, "cosine": cosine(output, outputs[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="*", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = [row for width in asked.widths for row in compare(width, asked.recipes, asked.rounds)]
    machine = describe_machine() | {"onnxruntime": version("onnxruntime")}
    if asked.json:
        print(json.dumps({"machine": machine, "results": rows}, indent=1))
        return
    print(one_line(machine))
    print(f"{'':6}{'':24}{'times fp32':>11}{'ms':>9}{'MB':>8}{'cosine':>8}  kernel")
    for row in rows:
        cells = f"{row['speed']:11.2f}{row['milliseconds']:9.2f}{row['megabytes']:8.1f}{row['cosine']:8.4f}"
        print(f"{row['width']:<6}{row['recipe']:24}{cells}  {row['kernel']}")


if __name__ == "__main__":
    main()
