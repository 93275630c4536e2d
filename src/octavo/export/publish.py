"""Directories that appear whole or not at all.

Everything is written in a hidden sibling of the target, on the same file system, synced, and swapped under the final
name. The sibling carries a lock of the writing process: what a killed run leaves is recognised by its free lock and
removed by the next write to the same target.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.errors import UserError

_log = logging.getLogger(__name__)

PARTIAL_PREFIX = ".octavo-partial-"
OLD_PREFIX = ".octavo-old-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def published(out: Path, *, kind: str, is_previous: Callable[[Path], bool]) -> Iterator[Path]:
    """A fresh directory to fill, which becomes ``out`` when the block ends without an error.

    Args:
        out: Final name. Its parents are made.
        kind: What is being written, for messages.
        is_previous: Whether a directory is an earlier output of the same kind, which may be replaced.

    Raises:
        UserError: ``out`` is a file, or a directory that is neither empty nor an earlier output; or the
            place cannot be written to. What was there stays as it was.
    """
    out = out.expanduser().resolve()
    check_target(out, kind=kind, is_previous=is_previous)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        partial = out.with_name(f"{PARTIAL_PREFIX}{out.name}-{secrets.token_hex(4)}")
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror} ({error.filename})") from error
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        _sync_tree(partial)
        _swap(partial, out)
        _sync(out.parent)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def check_target(out: Path, *, kind: str, is_previous: Callable[[Path], bool]) -> None:
    """Raise ``UserError`` unless ``out`` is free, empty, or an earlier output of the same kind."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"cannot write {kind} to {out}: it is a file; choose another name or remove it")
    if any(out.iterdir()) and not is_previous(out):
        names = sorted(path.name for path in out.iterdir())
        there = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise UserError(
            f"cannot write {kind} to {out}: the directory holds something else ({there}), and octavo replaces only "
            f"an earlier output of the same kind; choose another name or empty it"
        )


def _swap(partial: Path, out: Path) -> None:
    """``partial`` takes the name ``out``; what had it before ends up under ``partial`` or is gone."""
    if not out.exists():
        partial.rename(out)
        return
    if _exchange(partial, out):
        return
    old = out.with_name(f"{OLD_PREFIX}{out.name}-{secrets.token_hex(4)}")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux ``renameat2``); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _sweep(out: Path) -> None:
    """Remove what killed writers of ``out`` left; give an output back that was moved aside and not replaced."""
    for path in list(out.parent.iterdir()):
        if _is_leftover(path, OLD_PREFIX, out.name) and not out.exists():
            _log.warning("restoring %s, which an interrupted write had moved aside", out)
            path.rename(out)
        elif _is_leftover(path, OLD_PREFIX, out.name) or (
            _is_leftover(path, PARTIAL_PREFIX, out.name) and not _is_locked(path)
        ):
            _log.info("removing %s, which an interrupted write left", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_leftover(path: Path, prefix: str, name: str) -> bool:
    return re.fullmatch(re.escape(prefix + name) + "-[0-9a-f]{8}", path.name) is not None


def _is_locked(directory: Path) -> bool:
    """True while the process that fills ``directory`` lives."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
