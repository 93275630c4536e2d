"""What octavo's own choices cost a real sentence encoder, beside plain rounding and beside peers' algorithms.

    python -m benchmarks.quality.algorithms [--draws 3] [--texts 192] [--limit PAIRS] [--peer NAME=PYTHON ...] [--json]

Mean cosine to the unquantized embeddings, calibrated on texts that the test does not have. Each draw of calibration
texts gives one figure; a difference to a peer is formed within a draw, and its standard error is over the draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import files
from benchmarks.machine import describe_machine, one_line
from benchmarks.peers.call import call_peer
from benchmarks.quality.encoder import Judge, bundled_encoder

import octavo
from octavo.sources import Dataset

_PAIRS_PER_DRAW = 96
PEERS = {name: Path(__file__).parents[1] / "peers" / f"{name}_encoder.py" for name in ("llmcompressor",)} | {
    "modelopt": Path(__file__).parents[1] / "peers" / "modelopt_algorithms.py"
}


@dataclass(frozen=True, slots=True)
class Row:
    """One format: octavo's choice, its plain preset, and the least cosine that is wanted."""

    best: str
    plain: str
    goal: float | None = None


ROWS: dict[str, Row] = {
    "int8": Row("best:int8", "int8", 0.997),
    "int4-group128": Row("best:int4-group", "int4-group", 0.985),
    "int4-group32": Row("best:int4-group32", "int4-group32", 0.989),
    "nvfp4-weight-only": Row("best:nvfp4-weight-only", "nvfp4-weight-only", 0.990),
    "nvfp4": Row("best:nvfp4", "nvfp4", 0.981),
    "mxfp4": Row("best:mxfp4", "mxfp4"),
    "w4a8": Row("best:w4a8", "w4a8"),
}


def draws(count: int, num_texts: int) -> list[Dataset]:
    """Calibration texts, none in two draws."""
    everything = octavo.open_data(files.DRAWS)
    starts = [draw * _PAIRS_PER_DRAW for draw in range(count)]
    samples = [everything.samples[start : start + min(num_texts // 2, _PAIRS_PER_DRAW)] for start in starts]
    return [Dataset(f"draw {i}", everything.kind, part) for i, part in enumerate(samples)]


def cosine(recipe: str, model: str, judge: Judge, calibration: Dataset) -> float:
    """Of one recipe on one draw."""
    loaded = octavo.open_model(model)
    octavo.quantize(loaded, recipe, octavo.batches(calibration, loaded, batch_size=32))
    found = judge.judge(loaded)["cosine"]["quantized"]
    assert found is not None
    return found


def ours(names: Sequence[str], model: str, judge: Judge, calibration: Sequence[Dataset]) -> dict[str, Any]:
    """Format -> cosines of octavo's choice and of plain rounding, draw by draw."""
    results: dict[str, Any] = {}
    for name in names:
        row = ROWS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = {
            "best": [cosine(row.best, model, judge, draw) for draw in calibration],
            "plain": [cosine(row.plain, model, judge, draw) for draw in calibration],
            "goal": row.goal,
        }
    return results


def peers(given: Mapping[str, Path], model: str, limit: int | None, calibration: Sequence[Dataset]) -> dict[str, Any]:
    """Peer -> what its script printed."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, draw in enumerate(calibration):
            paths.append(Path(folder) / f"{i}.jsonl")
            pairs = (dict(zip(("query", "document"), sample.texts, strict=True)) for sample in draw.samples)
            paths[-1].write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        for name, python in given.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            options = ["--model", model, "--pairs", str(files.TEST)]
            options += [part for path in paths for part in ("--calibration", str(path))]
            options += ["--limit", str(limit)] if limit else []
            found[name] = call_peer(python, PEERS[name], options)
    return found


def table(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Markdown. A peer's figure is followed by how much octavo's is above it, with its standard error."""
    lines = ["| format | octavo | plain rounding | goal | peers |", "| --- | --- | --- | --- | --- |"]
    for name, row in results.items():
        beside = [_beside(row["best"], *entry) for entry in _of_format(name, found)]
        goal = (
            "" if row["goal"] is None else f"{row['goal']}: {'met' if _mean(row['best']) >= row['goal'] else 'missed'}"
        )
        lines.append(
            f"| {name} | {_mean(row['best']):.4f} | {_mean(row['plain']):.4f} | {goal} | {'; '.join(beside)} |"
        )
    return "\n".join(lines)


def _of_format(name: str, found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    entries = [(peer, part) for peer, result in found.items() for part in result.get("results", {}).items()]
    return [(f"{peer} {method}", value) for peer, (method, value) in entries if method.split()[0] == name]


def _beside(best: Sequence[float], peer: str, value: Mapping[str, Any]) -> str:
    if "failed" in value:
        return f"{peer} could not"
    gaps = [a - b for a, b in zip(best, value["cosines"], strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{peer} {_mean(value['cosines']):.4f} ({_mean(gaps):+.4f} ± {error:.4f})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another sentence encoder's directory")
    parser.add_argument("--format", action="append", choices=ROWS, help="only this one (may be repeated)")
    parser.add_argument("--draws", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--texts", type=int, default=2 * _PAIRS_PER_DRAW, help="texts of a draw")
    parser.add_argument("--limit", type=int, help="only the first pairs of the test, for a quick look")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"one of {', '.join(PEERS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main() -> None:
    args = _parser().parse_args()
    files.check_sums()
    model = args.model or bundled_encoder()
    everything = octavo.open_data(files.TEST)
    test = Dataset(everything.name, everything.kind, everything.samples[: args.limit])
    calibration = draws(args.draws, args.texts)
    given = {name: Path(python) for name, _, python in (part.partition("=") for part in args.peer)}
    results = ours(args.format or list(ROWS), model, Judge(model, test), calibration)
    found = peers(given, model, args.limit, calibration)
    machine = describe_machine()
    if args.json:
        print(json.dumps({"machine": machine, "num_pairs": len(test), "octavo": results, "peers": found}, indent=1))
        return
    print(one_line(machine))
    print(f"{len(test)} pairs; {args.draws} draws of {args.texts} texts\n")
    print(table(results, found))


if __name__ == "__main__":
    main()
