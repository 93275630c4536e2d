"""Runs a module of ``benchmarks/peers`` in a peer's own venv."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def run_module(python: str | Path, module: str, arguments: Sequence[str]) -> tuple[list[str], str]:
    """The lines that it printed, and why it failed: empty where it did not."""
    command = [os.path.abspath(python), "-m", f"benchmarks.peers.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return lines, f"{module} in {python}: {reason}"
    return lines, ""


def call_peer(python: str | Path, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that it printed as its last line, or ``{"failed": why}``."""
    lines, failure = run_module(python, module, arguments)
    if failure:
        return {"failed": failure}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
