"""Where and when figures were taken: without it they mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import date

import torch


def describe_machine() -> dict[str, str]:
    """Date, processor, threads, versions, and how busy the machine was."""
    return {
        "date": date.today().isoformat(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def one_line(machine: dict[str, str]) -> str:
    """``date 2026-01-01, cores 2 ...``."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())
