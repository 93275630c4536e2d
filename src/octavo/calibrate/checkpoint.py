"""Finished blocks of a walk on disk, so that a walk that was killed goes on where it was.

One file for each block, ``block-0003.safetensors``, which appears by atomic rename, and ``walk.json``, which says of
what they are: digests of the model, the plan with its recipe, the data in its order, and octavo's own code. Where any
of these differs, the files are of no use and the walk starts anew. Data still pass through what is finished, block
after block, since the inputs of the next block are not kept: what is saved is the work of the steps.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from octavo.errors import UserError
from octavo.numerics.block_state import BlockState

logger = logging.getLogger(__name__)

WALK_FILE = "walk.json"
_SCHEMA = "octavo.walk/1"
_PARTIAL = ".partial"


class Checkpoint:
    """The blocks of one walk in a directory; see ``opened``.

    Args:
        directory: There, and nobody else's.
        fingerprint: What the blocks are of, part by part.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, str]) -> None:
        self.directory = directory
        self.num_kept = 0
        self._gave_up = False
        self._goes_on = self._is_ours(fingerprint)
        if not self._goes_on:
            for path in directory.glob("block-*.safetensors"):
                path.unlink()
            text = json.dumps({"schema": _SCHEMA, "fingerprint": dict(fingerprint)}, indent=1)
            self._write(WALK_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _is_ours(self, fingerprint: Mapping[str, str]) -> bool:
        path = self.directory / WALK_FILE
        if not path.is_file():
            return False
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            known = {}
        differs = [part for part in {**known, **fingerprint} if known.get(part) != fingerprint.get(part)]
        if differs:
            logger.warning(
                "the finished blocks in %s are of another %s: starting anew", self.directory, ", ".join(differs)
            )
        return not differs

    def find(self, number: int, name: str) -> BlockState | None:
        """The state of block ``number``; ``None`` from the first one on that is not there."""
        path = self._path(number)
        if not self._goes_on or not path.is_file():
            if self._goes_on and number:
                logger.warning("%d blocks were finished before and are taken from %s", number, self.directory)
            self._goes_on = False
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                state = BlockState({key: file.get_tensor(key) for key in file.keys()}, facts["state"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("cannot read %s (%s): this block and those after it are done again", path, error)
            self._goes_on = False
            return None
        if facts["name"] != name:
            self._goes_on = False
            return None
        self.num_kept = number + 1
        return state

    def keep(self, number: int, name: str, state: BlockState) -> None:
        """Put a finished block there. A full disk ends that with a warning, and not the walk."""
        if self._gave_up:
            return
        tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.tensors.items()}
        metadata = {"facts": json.dumps({"name": name, "state": dict(state.facts)})}
        try:
            self._write(self._path(number).name, lambda path: save_file(tensors, path, metadata))
        except (OSError, SafetensorError) as error:
            self._gave_up = True
            logger.warning(
                "cannot keep finished blocks in %s any more (%s): a crash would cost what comes from here on",
                self.directory,
                error,
            )
            return
        self.num_kept = number + 1

    def _path(self, number: int) -> Path:
        return self.directory / f"block-{number:04d}.safetensors"

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        fresh = self.directory / f".{name}{_PARTIAL}"
        try:
            write(fresh)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(fresh, self.directory / name)
        finally:
            fresh.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where the blocks of a walk are kept, and of what they are, as far as that is known before the data are seen."""

    directory: Path
    fingerprint: Mapping[str, str]

    def opened(self, *, data: str) -> AbstractContextManager[Checkpoint]:
        """``opened`` for data of this digest."""
        return opened(self.directory, {**self.fingerprint, "data": data})


@contextmanager
def opened(directory: Path, fingerprint: Mapping[str, str]) -> Iterator[Checkpoint]:
    """The checkpoint in ``directory``, which is made if it is not there and stays when the block ends.

    Raises:
        UserError: the directory holds something else, cannot be written, or another process works on it.
    """
    check_checkpoint(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot keep finished blocks in {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works on the blocks in {directory}: wait for it, or end it") from None
        try:
            found = Checkpoint(directory, fingerprint)
        except OSError as error:
            raise UserError(f"cannot keep finished blocks in {directory}: {error.strerror}") from error
        try:
            yield found
        except BaseException:
            if found.num_kept:
                logger.warning("%d finished blocks are kept in %s for the next try", found.num_kept, directory)
            raise
    finally:
        os.close(lock)


def check_checkpoint(directory: Path) -> None:
    """Raise ``UserError`` unless ``directory`` is free, empty, or holds finished blocks."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"cannot keep finished blocks in {directory}: it is a file")
    if not directory.is_dir() or (directory / WALK_FILE).is_file():
        return
    if any(path.suffix != _PARTIAL for path in directory.iterdir()):
        raise UserError(f"cannot keep finished blocks in {directory}: it holds something else; choose another name")


def removed(directory: Path) -> None:
    """Remove a checkpoint that is not needed any more; nothing else that lies there."""
    for path in (*directory.glob("block-*.safetensors"), *directory.glob(f".*{_PARTIAL}"), directory / WALK_FILE):
        path.unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
