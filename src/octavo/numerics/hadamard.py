"""Hadamard matrices, and rotations by them.

Sizes are ``2^k`` times 1, 12, 20, 28 or 36: Sylvester's doubling of Paley's constructions (R. Paley, On orthogonal
matrices, 1933). Divided by the root of its size such a matrix is orthogonal, so that a rotation spreads outliers over a
block and changes no product of rotated tensors (QuaRot, arXiv:2404.00456; block by block MR-GPTQ, arXiv:2509.23202).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from octavo.errors import UserError

# order -> the prime q of its construction: Paley I is of order q + 1 (q = 3 mod 4), Paley II of 2 (q + 1) (q = 1 mod 4)
_PALEY = {12: 11, 20: 19, 28: 13, 36: 17}


def has_hadamard(size: int) -> bool:
    """Whether ``hadamard(size)`` is known.

    >>> [size for size in range(1, 41) if has_hadamard(size)]
    [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    """
    return size >= 1 and _seed_of(size) is not None


def largest_block(width: int, *, most: int = 1 << 30) -> int:
    """The largest size with a Hadamard matrix that divides ``width`` and is at most ``most``.

    >>> largest_block(384), largest_block(384, most=16), largest_block(100)
    (384, 16, 20)
    """
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0 and has_hadamard(size))


def hadamard(size: int) -> Tensor:
    """``(size, size)`` entries +1 and -1, fp32, with ``H H^T = size I``.

    Raises:
        UserError: none of this size is known.
    """
    seed = _seed_of(size)
    if seed is None:
        raise UserError(
            f"there is no Hadamard matrix of size {size} here: sizes are 2^k times 1, 12, 20, 28 or 36; "
            "rotate smaller blocks, of a size that divides the channels"
        )
    matrix = torch.tensor(_paley(seed), dtype=torch.float32) if seed > 1 else torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate(x: Tensor, block_size: int, *, inverse: bool = False) -> Tensor:
    """``x`` times the orthogonal matrix on every ``block_size`` neighbours of the last axis, in ``x``'s dtype.

    ``rotate(x) @ rotate(w).T`` is ``x @ w.T``. The powers of two are a fast transform, ``n log n``.

    Args:
        x: ``(..., channels)``.
        block_size: Divides the channels.
        inverse: By the transposed matrix, which undoes it.

    Raises:
        UserError: the size does not divide the channels, or has no Hadamard matrix.
    """
    if x.shape[-1] % block_size:
        raise UserError(f"blocks of {block_size} do not divide {x.shape[-1]} channels")
    if not has_hadamard(block_size):
        hadamard(block_size)
    seed = _seed_of(block_size) or 1
    values = x.float().reshape(-1, block_size // seed, seed)
    if seed > 1:
        matrix = hadamard(seed).to(x.device)
        values = values @ (matrix.T if inverse else matrix)
    turned: Tensor = _sylvester(values) * block_size**-0.5
    return turned.reshape(x.shape).to(x.dtype)


class Turn:
    """An orthogonal matrix on every ``size`` neighbours of the last axis: random signs and a Hadamard matrix.

    Signs keep a common offset of all channels from ending up in one (QuIP#, arXiv:2402.04396, section 3). With
    ``keeps_mean`` it is ``H D H^T`` with a Hadamard matrix whose first column is constant and signs ``D`` that begin
    with +1: it maps ``(1, 1, ...)`` to itself, so that it commutes with subtracting the mean.

    Args:
        size: Of the Hadamard matrix.
        keeps_mean: See above.
    """

    def __init__(self, size: int, *, keeps_mean: bool = False) -> None:
        generator = torch.Generator().manual_seed(size)
        self.size = size
        self.keeps_mean = keeps_mean
        self._signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        self._signs[0] = 1.0
        self._first = rotate(torch.eye(size)[:1], size, inverse=True).sign().squeeze(0)  # of each row of the matrix

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` turned, fp32.

        Args:
            x: ``(..., channels)``, a multiple of the size.
        """
        blocks = x.float().reshape(*x.shape[:-1], -1, self.size)
        signs, first = self._signs.to(x.device), self._first.to(x.device)
        if self.keeps_mean:
            turned = rotate(rotate(blocks * first, self.size) * signs, self.size, inverse=True) * first
        else:
            turned = rotate(blocks * signs, self.size)
        return turned.flatten(-2)


def _sylvester(values: Tensor) -> Tensor:
    """The transform of the middle axis, whose length is a power of two; it is its own inverse."""
    count, length, inner = values.shape
    step = 1
    while step < length:
        pairs = values.reshape(count, length // (2 * step), 2, step * inner)
        first, second = pairs.unbind(2)
        values = torch.stack([first + second, first - second], 2)
        step *= 2
    return values.reshape(count, length, inner)


@cache
def _seed_of(size: int) -> int | None:
    """The factor of ``size`` that is no power of two: 1 or one of Paley's orders; ``None`` where that fails."""
    for seed in (1, *_PALEY):
        quotient, rest = divmod(size, seed)
        if rest == 0 and quotient >= 1 and quotient & (quotient - 1) == 0:
            return seed
    return None


@cache
def _paley(order: int) -> tuple[tuple[int, ...], ...]:
    prime = _PALEY[order]
    squares = {i * i % prime for i in range(1, prime)}

    def chi(a: int) -> int:
        a %= prime
        return 0 if a == 0 else 1 if a in squares else -1

    jacobsthal = [[chi(i - j) for j in range(prime)] for i in range(prime)]
    if prime % 4 == 3:  # H = I + S with a skew S
        skew = [[0] + [1] * prime] + [[-1, *row] for row in jacobsthal]
        return tuple(tuple(value + (i == j) for j, value in enumerate(row)) for i, row in enumerate(skew))
    symmetric = [[0] + [1] * prime] + [[1, *row] for row in jacobsthal]
    off, on = ((1, 1), (1, -1)), ((1, -1), (-1, -1))  # what a 1 and what a diagonal 0 become
    rows: list[tuple[int, ...]] = []
    for row in symmetric:
        for half in (0, 1):
            rows.append(tuple(v for value in row for v in (on[half] if value == 0 else _times(off[half], value))))
    return tuple(rows)


def _times(pair: tuple[int, int], sign: int) -> tuple[int, int]:
    return pair[0] * sign, pair[1] * sign
