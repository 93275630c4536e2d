"""The compiled loops of ``rounding.cpp``: built once on this machine, kept on disk, called through ctypes.

Nothing happens at import. The first tensor that could use them loads them, which takes milliseconds, or, where this
machine has not built them yet, starts a compiler in the background, which takes seconds; until it is done everything
is computed by the other backends, with the same bits. Whatever goes wrong is one line in the log.

=====================  ============================================================================================
environment variable   meaning
=====================  ============================================================================================
``OCTAVO_COMPILE``     ``background`` (default); ``wait``: the first use waits for the compiler; ``off``: never used
``OCTAVO_CACHE``       directory of the built library; default ``$XDG_CACHE_HOME/octavo`` or ``~/.cache/octavo``
``CXX``                the compiler; default the first of ``c++``, ``g++``, ``clang++``
=====================  ============================================================================================
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("rounding.cpp")
TIMEOUT_S = 120.0
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
_FLAGS = (
    "-std=c++17", "-O3", _NATIVE, "-fPIC", "-shared",
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",  # the bits of numerics: no fast-math, no fused sums
)  # fmt: skip


class NoKernelsError(Exception):
    """Why there is no compiled library."""


class Library:
    """The one library of this process: not asked for, being built, ready, or impossible."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_asked_for = False
        self._worker: threading.Thread | None = None
        self._loaded: ctypes.CDLL | None = None
        self._obstacle = ""

    def get(self) -> ctypes.CDLL | None:
        """The library, or ``None`` while it is not ready (``reason`` says why). Never blocks unless asked to."""
        if self._loaded is not None or self._obstacle:
            return self._loaded
        mode = os.environ.get("OCTAVO_COMPILE", "background")
        if mode == "off":
            return None
        self._start()
        if mode == "wait":
            self.wait()
        return self._loaded

    def wait(self) -> bool:
        """Block until the library is ready (true) or impossible (false)."""
        self._start()
        if self._worker is not None:
            self._worker.join()
        return self._loaded is not None

    def give_up(self, why: str) -> None:
        """Never use the library again in this process."""
        self._loaded, self._obstacle = None, why
        logger.warning("rounding is computed without compiled kernels, with the same results but slower: %s", why)

    @property
    def reason(self) -> str:
        """Why ``get`` gives nothing."""
        if self._obstacle:
            return self._obstacle
        if os.environ.get("OCTAVO_COMPILE") == "off":
            return "switched off by OCTAVO_COMPILE"
        return "being compiled in the background"

    def _start(self) -> None:
        """Load what was built before, here and now; build in the background what was not."""
        with self._lock:
            if self._is_asked_for:
                return
            self._is_asked_for = True
            with self._caught():
                path = library_path(_compiler())
                if path.exists():
                    self._loaded = _load(path)
                else:
                    self._worker = threading.Thread(target=self._build, name="octavo-compile", daemon=True)
                    self._worker.start()

    def _build(self) -> None:
        with self._caught():
            compiler = _compiler()
            self._loaded = _load(build(compiler, library_path(compiler)))

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except (NoKernelsError, OSError, AttributeError) as error:
            self.give_up(str(error))


def cache_directory() -> Path:
    """Where built libraries are kept."""
    if "OCTAVO_CACHE" in os.environ:
        return Path(os.environ["OCTAVO_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


def library_path(compiler: str) -> Path:
    """The library for this source, compiler and processor: another one of any of them has another name."""
    status = os.stat(compiler)
    parts = (SOURCE.read_bytes(), " ".join(_FLAGS), compiler, status.st_size, status.st_mtime_ns, _processor())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return cache_directory() / f"rounding-{digest}.so"


def build(compiler: str, path: Path) -> Path:
    """Compile to ``path``, which appears complete or not at all; of many processes one compiles, the others wait.

    Raises:
        NoKernelsError: the compiler fails or takes longer than ``TIMEOUT_S``.
        OSError: the cache directory cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as directory:
                built = Path(directory) / path.name
                _compile(compiler, built)
                built.replace(path)
    return path


def _compile(compiler: str, target: Path) -> None:
    logger.info("compiling the rounding kernels with %s, once on this machine", compiler)
    process = subprocess.Popen(
        [compiler, *_FLAGS, str(SOURCE), "-o", str(target)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the driver and what it started

    atexit.register(end)  # a short program does not wait for it
    try:
        _, complaint = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        if process.poll() is None:
            end()
            process.wait()
            raise NoKernelsError(f"{compiler} took longer than {TIMEOUT_S:.0f} s") from None
        _, complaint = process.communicate()  # it was this process that slept
    finally:
        atexit.unregister(end)
    if process.returncode != 0:
        first = next((line for line in complaint.splitlines() if "error" in line), complaint.strip()[:200])
        raise NoKernelsError(f"{compiler} failed with status {process.returncode}: {first}")


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NoKernelsError(f"there is no C++ compiler {wanted or '(c++, g++ or clang++)'} on the PATH")


def _load(path: Path) -> ctypes.CDLL:
    """Only what this user, or the administrator, alone could have written: a library is code."""
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise NoKernelsError(f"{place} can be written by others: remove it, or set OCTAVO_CACHE to a private place")
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """A lock between processes, where the file system has locks; without them several may compile the same."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """What code for this very processor depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.machine()} {platform.processor()}"


LIBRARY = Library()
