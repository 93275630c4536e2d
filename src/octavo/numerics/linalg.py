"""Linear algebra on Gram matrices ``G = X^T X`` of a layer's inputs, safe for whatever calibration gives.

Dead channels, fewer samples than channels, a single one, huge or tiny inputs: damping makes all of them positive
definite, and grows until the factorization succeeds. fp64 inside, so that processors agree and squares have room.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_TRIES = 12


def normalized(gram: Tensor) -> Tensor:
    """fp64, symmetric, with a mean diagonal of 1; the identity where nothing was seen, or sums have overflowed."""
    gram = gram.double()
    gram = (gram + gram.T) / 2
    mean = gram.diagonal().mean()
    if not bool((mean > 0) & gram.isfinite().all()):
        return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return gram / mean


def damped(gram: Tensor, damping: float) -> Tensor:
    """``normalized(gram)`` plus ``damping`` on its diagonal: a share of the mean, as in GPTQ (section 3.3)."""
    result = normalized(gram)
    result.diagonal().add_(damping)
    return result


def factor(gram: Tensor, damping: float) -> Tensor:
    """Lower triangular ``L`` with ``L L^T = damped(gram)``, fp64; with ten times the damping as often as it takes."""
    return _factored(gram, damping)[0]


def _factored(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """``factor``, and the damping that it took."""
    for attempt in range(_MOST_TRIES):
        used = damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped(gram, used))
        if not bool(failed) and bool(lower.isfinite().all()):
            assert isinstance(lower, Tensor)
            return lower, used
    return torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device), damping * 10**_MOST_TRIES


def feedback(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular ``U`` with ``U^T U = damped(gram)^-1``, fp32: how GPTQ spreads an error over later columns.

    One factorization and one triangular inverse: with columns reversed, ``G = R R^T`` for an upper ``R``, and ``U`` is
    its inverse.

    Returns:
        ``U``, and the damping that it took: more than ``damping`` for what is no Gram matrix.
    """
    reversed_lower, used = _factored(gram.flip(0, 1), damping)
    eye = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(reversed_lower, eye, upper=False)
    return inverse.flip(0, 1).float(), used


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G E^T)``: the squared error of a layer's outputs on all samples behind ``gram``, fp32 ``()``."""
    return (error.float() @ gram.float()).mul_(error.float()).sum()


def low_rank(matrix: Tensor, rank: int, *, seed: int = 0, passes: int = 2) -> tuple[Tensor, Tensor]:
    """``B (rows, rank)`` and ``A (rank, columns)`` with ``B A`` near the best of this rank, fp32.

    Randomized range finder with power iterations (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1),
    ``B`` and ``A`` sharing the singular values evenly, so that either can be stored in bf16.

    Args:
        matrix: ``(rows, columns)``.
        rank: At most the smaller side.
        seed: Of the random directions.
        passes: Power iterations.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = min(rank + 10, *matrix.shape)
    wide = matrix.double()
    sketch = torch.randn(matrix.shape[1], directions, generator=generator, dtype=torch.float64).to(matrix.device)
    basis, _ = torch.linalg.qr(wide @ sketch)
    for _ in range(passes):
        other, _ = torch.linalg.qr(wide.T @ basis)
        basis, _ = torch.linalg.qr(wide @ other)
    left, values, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    root = values[:rank].sqrt()
    return ((basis @ left[:, :rank]) * root).float(), (root.unsqueeze(1) * right[:rank]).float()


def right_divided(matrix: Tensor, lower: Tensor) -> Tensor:
    """``matrix @ lower^-1`` for a lower triangular ``lower``, fp32."""
    found: Tensor = torch.linalg.solve_triangular(lower, matrix.double(), upper=False, left=False)
    return found.float()
