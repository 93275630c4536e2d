"""Random numbers that are the same on every machine and with every version of every library.

NumPy promises no such thing for its distributions (NEP 19), so the demo draws from SplitMix64
(Steele, Lea and Flood, 2014): a counter, and a mixing of its 64 bits. Integers only.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Item = TypeVar("_Item")
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def fingerprint(text: str) -> int:
    """The first 64 bits of the SHA-256 of ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Dice:
    """A stream of random choices that depends on its name alone."""

    def __init__(self, name: str) -> None:
        self._counter = fingerprint(name)

    def bits(self) -> int:
        """The next 64 random bits."""
        self._counter = (self._counter + _STEP) & _MASK
        z = self._counter
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return z ^ (z >> 31)

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + ((self.bits() >> 32) * (high - low + 1) >> 32)

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One of ``items``."""
        return items[self.between(0, len(items) - 1)]

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self.between(0, 99) < percent


def random_bytes(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of ``shape`` (uint8): the stream of SplitMix64 from ``seed``, least significant byte first."""
    num_bytes = int(np.prod(shape))
    counter = np.arange(1, -(-num_bytes // 8) + 1, dtype=np.uint64)
    z = counter * np.uint64(_STEP) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    z = z ^ (z >> np.uint64(31))
    return z.astype("<u8").view(np.uint8)[:num_bytes].reshape(shape)
