"""What this machine is: recorded with every run, since figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from octavo.numerics.digest import digest_of

_PACKAGES = ("torch", "transformers", "numpy", "safetensors")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, processor with its instruction set, threads and device."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["cpu"] = (
        f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return found


def code_digest() -> str:
    """Of octavo's own files, and the versions of what computes: equal where the same input gives the same bytes."""
    root = Path(__file__).parents[1]
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp"))
    parts = [(str(path.relative_to(root)), path.read_bytes()) for path in files]
    return digest_of(parts, torch.__version__, torch.backends.cpu.get_cpu_capability())


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
