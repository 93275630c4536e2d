"""How far some tensors are from what they should be."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Sum of the squares of all differences over the sum of the squares of ``expected``, in fp32; 0 for zeros."""
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.float().square().sum()) for b in expected)
    return error / size if size else 0.0
