"""Writes the pairs: the first line of a function's docstring, and its source without the docstring.

From the standard library of the Python 3.11 that runs this; the files beside it were made by 3.11.7. Another version
gives other pairs, so the files are kept and their SHA-256 is checked wherever they are used.

    python3.11 benchmarks/data/make_pairs.py --out DIRECTORY

The draws are more pairs to calibrate with: as many as there are draws, one after the other.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TEST_FILE = "stdlib_functions.jsonl"
CALIBRATION_FILE = "stdlib_functions_calibration.jsonl"
DRAWS_FILE = "stdlib_functions_draws.jsonl"
SUMS_FILE = "SHA256SUMS"

_NUM_TEST, _NUM_CALIBRATION, _NUM_DRAWN, _SEED = 1000, 32, 288, 20
_SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_MAX_CHARACTERS = 400
_MIN_QUERY, _MIN_DOCUMENT = 20, 60


@dataclass(frozen=True, slots=True)
class Pair:
    """What somebody would ask for, and the function that does it."""

    query: str
    document: str


def pairs_of_source(source: str) -> Iterator[Pair]:
    """One pair for every documented function, in order of appearance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have old escapes
        tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
            doc = ast.get_docstring(node)
            if doc:
                yield Pair(doc.strip().splitlines()[0].strip(), _without_docstring(node, lines))


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's own lines, from ``def``, cut after ``_MAX_CHARACTERS``."""
    first, last = node.body[0].lineno, node.body[0].end_lineno
    assert last is not None
    kept = [*lines[node.lineno - 1 : first - 1], *lines[last : node.end_lineno]]
    return textwrap.dedent("\n".join(kept)).strip()[:_MAX_CHARACTERS].rstrip()


def collect(library: Path) -> list[Pair]:
    """Pairs of all of ``library``, no query and no document twice, sorted by file."""
    found: dict[str, Pair] = {}
    documents: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(library).parts):
            continue
        for pair in pairs_of_source(path.read_text(encoding="utf-8")):
            key = pair.query.casefold()
            long_enough = len(pair.query) >= _MIN_QUERY and len(pair.document) >= _MIN_DOCUMENT
            if long_enough and key not in found and pair.document not in documents:
                found[key] = pair
                documents.add(pair.document)
    return list(found.values())


def write(out: Path, pairs: list[Pair]) -> None:
    """Both files and their sums."""
    random.Random(_SEED).shuffle(pairs)
    chosen = {
        TEST_FILE: pairs[:_NUM_TEST],
        CALIBRATION_FILE: pairs[_NUM_TEST : _NUM_TEST + _NUM_CALIBRATION],
        DRAWS_FILE: pairs[_NUM_TEST + _NUM_CALIBRATION :][:_NUM_DRAWN],
    }
    sums = []
    for name, part in chosen.items():
        content = "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in part).encode()
        (out / name).write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (out / SUMS_FILE).write_text("".join(sums), encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"the pairs are from the library of Python 3.11; this is {sys.version.split()[0]}")
    pairs = collect(Path(sysconfig.get_path("stdlib")))
    print(f"{len(pairs)} functions; {_NUM_TEST} to {out / TEST_FILE}, {_NUM_CALIBRATION} others to calibrate with")
    write(out, pairs)


if __name__ == "__main__":
    main()
