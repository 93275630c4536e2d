"""The pair files, checked before they are used."""

from __future__ import annotations

import hashlib
from pathlib import Path

DATA = Path(__file__).parent
TEST = DATA / "stdlib_functions.jsonl"
CALIBRATION = DATA / "stdlib_functions_calibration.jsonl"
DRAWS = DATA / "stdlib_functions_draws.jsonl"  # three draws of 96 pairs, to calibrate with
SUMS = DATA / "SHA256SUMS"


def check_sums() -> dict[str, str]:
    """SHA-256 of every pair file, by name.

    Raises:
        ValueError: a file is not the one whose sum was written down.
    """
    expected = {name: digest for digest, name in map(str.split, SUMS.read_text(encoding="ascii").splitlines())}
    for name, digest in expected.items():
        found = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
        if found != digest:
            raise ValueError(f"{DATA / name} has SHA-256 {found}, and figures are for {digest}")
    return expected
