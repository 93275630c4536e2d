"""Tensors that wait for their turn: in memory up to a budget, beyond it on disk."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import load_file, save_file
from torch import Tensor

BUDGET_BYTES = 2 << 30


class Store:
    """Keeps lists of tensors; a context manager that leaves no file behind.

    Args:
        budget_bytes: What may stay in memory.
        directory: Where files go when the budget is spent; the system's temporary directory unless given.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES, directory: Path | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._parent = directory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._keys = itertools.count()
        self._held: dict[int, tuple[Tensor, ...]] = {}
        self._devices: dict[int, tuple[str, ...]] = {}

    def put(self, tensors: Sequence[Tensor]) -> int:
        """Keep ``tensors``, which nobody may write to afterwards; the number that ``get`` and ``drop`` take."""
        key = next(self._keys)
        size = sum(t.nbytes for t in tensors)
        if self.held_bytes + size <= self.budget_bytes:
            self._held[key] = tuple(tensors)
            self.held_bytes += size
        else:
            named = {str(k): t.detach().cpu().clone().contiguous() for k, t in enumerate(tensors)}
            save_file(named, self._path(key))
            self._devices[key] = tuple(str(t.device) for t in tensors)
        return key

    def get(self, key: int) -> tuple[Tensor, ...]:
        """What was kept under ``key``, on the device where it was."""
        if key in self._held:
            return self._held[key]
        named = load_file(self._path(key))
        return tuple(named[str(k)].to(device) for k, device in enumerate(self._devices[key]))

    def drop(self, key: int) -> None:
        """Forget ``key``."""
        held = self._held.pop(key, None)
        if held is not None:
            self.held_bytes -= sum(t.nbytes for t in held)
        elif self._devices.pop(key, None) is not None:
            self._path(key).unlink()

    def close(self) -> None:
        """Forget everything; the files are removed."""
        self._held.clear()
        self._devices.clear()
        self.held_bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _path(self, key: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="octavo-", dir=self._parent)
        return Path(self._folder.name) / f"{key}.safetensors"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
