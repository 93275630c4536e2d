"""Hadamard rotations on blocks of neighbours: orthogonal, so that rotating inputs and weights alike changes nothing."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from octavo.errors import UserError


@lru_cache(maxsize=64)
def hadamard(size: int) -> Tensor:
    """``(size, size)`` matrix of 1 and -1 whose rows are orthogonal to each other, fp32. Not to be written to.

    Sizes are powers of two (Sylvester's construction).

    Raises:
        UserError: there is none of this size.
    """
    if size < 1 or size & (size - 1):
        raise UserError(f"there is no Hadamard matrix of size {size} here: choose a power of two")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate(x: Tensor, block_size: int) -> Tensor:
    """``x`` with every ``block_size`` neighbours on the last axis multiplied by ``hadamard(block_size)``, normalised.

    ``rotate(x) @ rotate(w).T == x @ w.T`` for ``(..., in_features)`` inputs and weights.

    Raises:
        UserError: the size does not divide the last axis, or has no Hadamard matrix.
    """
    if x.shape[-1] % block_size:
        raise UserError(f"blocks of {block_size} do not divide {x.shape[-1]} channels")
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)
    turned: Tensor = blocks @ (hadamard(block_size).to(x.device) / block_size**0.5)
    return turned.reshape(x.shape).to(x.dtype)
