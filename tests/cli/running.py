"""The command line, run in this process: torch and transformers are imported once for all tests."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from octavo.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def message(self) -> str:
        """Standard error in one line, however it was folded."""
        return " ".join(self.err.split())


def octavo(*arguments: object, columns: int = 100) -> Outcome:
    """Run ``octavo ARGUMENTS`` as the console script would."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    words = ["octavo", *map(str, arguments)]

    with ExitStack() as stack:
        for surrounding in (
            patch.object(sys, "argv", words),
            patch.dict(os.environ, environment),
            _logging_restored(),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            stack.enter_context(surrounding)
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Outcome(status, out.getvalue(), err.getvalue())


def fine(*arguments: object, columns: int = 100) -> Outcome:
    """Run a command that must succeed."""
    outcome = octavo(*arguments, columns=columns)
    assert outcome.status == 0, outcome.err
    return outcome


def refused(*arguments: object) -> str:
    """Run a command that must be refused as a user's mistake; its message, in one line."""
    outcome = octavo(*arguments)
    assert outcome.status == 2, f"status {outcome.status}: {outcome.err}"
    assert outcome.out == "", "standard output is not empty"
    assert "Traceback" not in outcome.err
    return outcome.message


def process(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``octavo ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "octavo.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
        check=False,
    )


@contextmanager
def _logging_restored() -> Iterator[None]:
    """The command line sets up logging for a process that ends with it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # or basicConfig(force=True) would close those of pytest
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
