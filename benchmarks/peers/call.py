"""Runs a script in a peer's own venv."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def call_peer(python: Path, script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that ``script`` printed as its last line, or ``{"failed": why}``."""
    done = subprocess.run([str(python), str(script), *arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"failed": f"{script.name} in {python}: {reason}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
