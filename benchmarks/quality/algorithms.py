"""What octavo's own choices cost two real models, beside plain rounding and beside peers' algorithms.

    python -m benchmarks.quality.algorithms [--subject encoder] [--draws 3] [--pairs N] [--peer NAME=PYTHON ...]

The sentence encoder is judged by the mean cosine to the unquantized embeddings, the language model by the perplexity
it loses and by the divergence of its predictions from the unquantized ones. Each draw of calibration texts, none of
which the test has, gives one figure; a difference to a peer is formed within a draw, and its standard error is over
the draws. A cell is one method on one draw: a process of its own makes it, and ``--work`` keeps it, so that a run goes
on where it was interrupted (``--again TEXT`` makes cells anew whose key has the text).

Of a peer's methods for a format, all are run on the first draw, and the best of them on the others.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import files
from benchmarks.machine import describe_machine, one_line
from benchmarks.peers.call import run_module
from benchmarks.quality.encoder import bundled_encoder

LIBRARIES = ("octavo", "modelopt", "llmcompressor", "autoround", "torchao")
GOALS = {"int8": 0.997, "int4-group128": 0.985, "int4-group32": 0.989, "nvfp4-weight-only": 0.990, "nvfp4": 0.981}
"""Format -> the least cosine that is wanted."""

Series = Mapping[int, float]
"""Draw -> figure."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model with its texts; ``metrics`` are shown, and the first one says which of two results is better."""

    name: str
    model: str
    test: Path
    draws: tuple[Path, ...]
    metrics: Mapping[str, int]
    limit: int | None = None

    def __str__(self) -> str:
        return self.name


METRICS: Mapping[str, Mapping[str, int]] = {"encoder": {"cosine": 1}, "language": {"kl": -1, "increase": -1}}
"""Subject -> metric -> 1 where more is better, else -1."""


def subject(name: str, args: argparse.Namespace) -> Subject:
    """The model, with its draws written into the work directory."""
    if name == "encoder":
        files.check_sums()
        model, test, source, per_draw = args.encoder or bundled_encoder(), files.TEST, files.DRAWS, args.texts // 2
        rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
        parts = [rows[96 * draw : 96 * draw + min(per_draw, 96)] for draw in range(args.draws)]
    else:
        model = args.language or _language_model()
        test = Path(model) / "held_out.txt"
        rows = (Path(model) / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        parts = [rows[draw::3][: args.texts // 6] for draw in range(args.draws)]
    paths = tuple(args.work / f"{name}-draw{draw}.jsonl" for draw in range(args.draws))
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(part), encoding="utf-8")
    model = str(Path(model).absolute())
    limit = {"encoder": args.pairs, "language": args.windows}[name]
    return Subject(name, model, test, paths, METRICS[name], limit)


def _language_model() -> str:
    from octavo.demo.catalog import model_path

    return str(model_path("llama"))


class Cells:
    """Results by key, in a file that is written after each of them."""

    def __init__(self, work: Path, pythons: Mapping[str, str], *, makes: bool = True) -> None:
        self.work, self.pythons, self.path, self.makes = work, pythons, work / "cells.json", makes

    def kept(self) -> dict[str, Any]:
        """What the file has; another run may add to it meanwhile."""
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        return found

    def change(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """What the file has becomes something else; no other run writes meanwhile."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(change(self.kept()), indent=1), encoding="utf-8")
            partial.replace(self.path)

    def forget(self, text: str) -> None:
        """Make cells anew whose key has ``text``."""
        self.change(lambda kept: {key: value for key, value in kept.items() if text not in key})

    def get(self, of: Subject, library: str, method: str, draws: Sequence[int]) -> list[Any]:
        """What ``method`` gave on ``draws``; those that are not known yet are made. A crash is told, but not kept."""
        keys = {draw: key_of(of, library, method, draw) for draw in draws}
        found = self.kept()
        missing = [draw for draw in draws if keys[draw] not in found]
        if missing and not self.makes:
            found |= {keys[draw]: {} for draw in missing}
        elif missing:
            print(f"{of}: {library} {method} ...", file=sys.stderr, flush=True)
            made = {keys[draw]: cell for draw, cell in self._make(of, library, method, missing).items()}
            found |= made
            worth = {key: cell for key, cell in made.items() if "crashed" not in cell}
            self.change(lambda kept: kept | worth)
        return [found[key] for key in keys.values()]

    def _make(self, of: Subject, library: str, method: str, draws: Sequence[int]) -> dict[int, Any]:
        options = ["--subject", of.name, "--model", of.model, "--test", str(of.test), "--method", method]
        options += ["--reference", str(self.work / f"{of}-{_digest(of, 0)}.safetensors")]
        options += ["--limit", str(of.limit)] if of.limit else []
        options += [part for draw in draws for part in ("--calibration", str(of.draws[draw]))]
        printed, reason = run_module(self.pythons[library], f"{library}_cells", options)
        lines = [json.loads(line) for line in printed]
        known = lines[0] if lines else {}
        answers: dict[int, Any] = dict(zip(draws, lines[1:], strict=False))
        refused = [answer for answer in answers.values() if "failed" in answer]
        rest = refused[0] if refused else {"failed": reason[:300], "crashed": True}
        return {draw: known | answers.get(draw, rest) for draw in draws}


def key_of(of: Subject, library: str, method: str, draw: int) -> str:
    """Of a cell."""
    return f"{_digest(of, draw)} {of} {library} {draw} {method}"


def _digest(of: Subject, draw: int) -> str:
    """Of everything that a cell's figure depends on beside the library."""
    parts = (of.name, of.limit, of.draws[draw].read_text(encoding="utf-8"), of.test.read_text(encoding="utf-8"))
    weights = hashlib.sha256((Path(of.model) / "model.safetensors").read_bytes()).hexdigest()
    return hashlib.sha256(repr((*parts, weights)).encode()).hexdigest()[:8]


def methods(library: str, row: str) -> list[str]:
    """Of a library, for a format."""
    known = importlib.import_module(f"benchmarks.peers.{library}_cells").METHODS
    return [method for method in known if method.split()[0] == row]


def row_of(cells: Cells, of: Subject, row: str, libraries: Sequence[str]) -> dict[str, Any]:
    """Library and method -> its results, draw by draw; the best method of each peer on all draws."""
    every = range(len(of.draws))
    found: dict[str, Any] = {
        f"octavo {kind}": cells.get(of, "octavo", f"{row} {kind}", every) for kind in ("plain", "best")
    }
    for library in libraries:
        first = {method: cells.get(of, library, method, [0])[0] for method in methods(library, row)}
        metric, sign = next(iter(of.metrics.items()))
        worked = [method for method, cell in first.items() if "values" in cell]
        best = max(worked, key=lambda method: sign * first[method]["values"][metric], default=None)
        for method in first:
            wanted = every if method == best or not cells.makes else [0]
            found[f"{library} {method}"] = cells.get(of, library, method, wanted)
    return found


def table(of: Subject, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, one for each metric, with a column for each library: its best method.

    A peer's figure is followed by how much better octavo's is, with its standard error over the draws.
    """
    libraries = list(dict.fromkeys(name.split()[0] for found in rows.values() for name in found))
    lines = []
    for metric, sign in of.metrics.items():
        has_goal = metric == "cosine"
        named = [f"{library} {_version(library, rows)}".strip() for library in libraries[1:]]
        head = [metric, "octavo's choice", "plain", *(["goal"] if has_goal else []), *named]
        lines += [head, ["---"] * len(head)]
        for row, found in rows.items():
            best, plain = (_series(found[f"octavo {kind}"], metric) for kind in ("best", "plain"))
            goal = [_verdict(row, best)] if has_goal else []
            beside = [_column(library, found, best, (metric, sign)) for library in libraries[1:]]
            lines.append([row, _figure(best), _figure(plain), *goal, *beside])
        lines.append([])
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in lines)


def _version(library: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [
        cell for found in rows.values() for name, part in found.items() if name.split()[0] == library for cell in part
    ]
    return next((cell["version"] for cell in cells if "version" in cell), "")


def _verdict(row: str, best: Series) -> str:
    goal = GOALS.get(row)
    return "" if goal is None or not best else f"{goal} {'met' if _mean(best) >= goal else 'missed'}"


def _column(library: str, found: Mapping[str, Any], best: Series, metric: tuple[str, int]) -> str:
    """The library's best method for a format, or why it has none."""
    every = {name.split(None, 2)[2]: cells for name, cells in found.items() if name.split()[0] == library}
    worked = {method: _series(cells, metric[0]) for method, cells in every.items()}
    worked = {method: series for method, series in worked.items() if series}
    if not worked:
        failures = [cell["failed"] for cells in every.values() for cell in cells if "failed" in cell]
        return _why(failures[0]) if failures else ""
    method = max(worked, key=lambda name: (len(worked[name]), metric[1] * _mean(worked[name])))
    return f"{method} {_beside(worked[method], best, metric[1])}"


def _beside(series: Series, best: Series, sign: int) -> str:
    gaps = [sign * (best[draw] - series[draw]) for draw in series if draw in best]
    if not gaps:
        return _figure(series)
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    spread = "one draw" if error is None else f"± {error:.2g}"
    lost = " **behind**" if error is not None and statistics.fmean(gaps) < -error else ""
    return f"{_figure(series)} ({statistics.fmean(gaps):+.2g} {spread}){lost}"


def _why(failure: str) -> str:
    """In a word or two."""
    known = {
        "cuda": "needs CUDA",
        "accelerator": "needs CUDA",
        "mslk": "needs CUDA (mslk)",
        "scaling configuration": "no product on CPU",
    }
    line = failure.splitlines()[0].replace("|", "/")[:60]
    return next((said for part, said in known.items() if part in failure.lower()), line)


def _series(cells: Sequence[Any], metric: str) -> Series:
    return {draw: cell["values"][metric] for draw, cell in enumerate(cells) if "values" in cell}


def _mean(series: Series) -> float:
    return statistics.fmean(series.values())


def _figure(series: Series) -> str:
    return f"{_mean(series):.4f}" if series else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", action="append", choices=METRICS, help="only this one")
    parser.add_argument("--encoder", help="another sentence encoder's directory")
    parser.add_argument("--language", help="another language model's directory, with held_out.txt, calibration.jsonl")
    parser.add_argument("--format", action="append", help="only this row of the table (may be repeated)")
    parser.add_argument("--draws", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--texts", type=int, default=192, help="texts of a draw")
    parser.add_argument("--pairs", type=int, help="only the first pairs of the encoder's test")
    parser.add_argument("--windows", type=int, help="only so many windows of the language model's test")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(LIBRARIES[1:]))
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where finished cells are kept")
    parser.add_argument("--again", action="append", default=[], metavar="TEXT", help="make cells anew that have it")
    parser.add_argument("--kept", action="store_true", help="show what is kept, and make nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    given = dict(part.split("=", 1) for part in args.peer)
    unknown = sorted(set(given) - set(LIBRARIES[1:]))
    if unknown:
        sys.exit(f"no peer {unknown[0]!r}: peers are {', '.join(LIBRARIES[1:])}")
    cells = Cells(args.work, {"octavo": sys.executable, **given}, makes=not args.kept)
    for text in args.again:
        cells.forget(text)
    names = args.format or list(importlib.import_module("benchmarks.peers.octavo_cells").FORMATS)
    results: dict[str, Any] = {}
    tables = []
    for of in (subject(name, args) for name in args.subject or METRICS):
        results[of.name] = {row: row_of(cells, of, row, list(given)) for row in names}
        tables.append(table(of, results[of.name]))
    if args.json:
        print(json.dumps({"machine": describe_machine(), "results": results}, indent=1))
        return
    print(one_line(describe_machine()))
    print(f"{args.draws} draws\n")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
