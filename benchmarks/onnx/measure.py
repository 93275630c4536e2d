"""What a piece of work costs its own process: seconds, processor seconds, memory above what the imports left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 8
"""Texts that calibration feeds at once, in every tool."""


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Do it once; what it imports was to be imported before."""
    before = _megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of the imports
    start, busy = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": busy, "peak_megabytes": _megabytes("VmHWM") - before}


def _megabytes(key: str) -> float:
    """Of this process, by the kernel's account: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024
