"""One number for what a tensor, or a nest of them, holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Digest:
    """Takes in values and is, in the end, a text that differs where any of them does."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, value: Any) -> None:
        """Take in tensors (values, dtype and shape), nests of them, and plain values; order counts."""
        match value:
            case Tensor():
                self._say(f"{value.dtype} {tuple(value.shape)}")
                self._hash.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            case Mapping():
                self._say(f"mapping {len(value)}")
                for key, entry in value.items():
                    self.add(key)
                    self.add(entry)
            case tuple() | list():
                self._say(f"sequence {len(value)}")
                for entry in value:
                    self.add(entry)
            case bytes():
                self._say(f"bytes {len(value)}")
                self._hash.update(value)
            case _:
                self._say(repr(value))

    def _say(self, text: str) -> None:
        self._hash.update(f"{text}\n".encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()

    def watched(self, values: Iterable[Any]) -> Iterator[Any]:
        """``values``, taken in as they pass."""
        for value in values:
            self.add(value)
            yield value


def digest_of(*values: Any) -> str:
    """The digest of some values.

    >>> digest_of(torch.zeros(2)) == digest_of(torch.zeros(2)), digest_of(1, 2) == digest_of((1, 2))
    (True, False)
    """
    found = Digest()
    for value in values:
        found.add(value)
    return str(found)
