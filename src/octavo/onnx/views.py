"""Parameters of a graph as ``numerics`` sees weights, ``(out_features, in_features)``, and the nodes that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How an initializer becomes a matrix and back.

    Args:
        shape: Shape of the initializer.
        is_transposed: Inputs come first: ``[K, N]`` of a MatMul, ``(in, out, ...)`` of a transposed convolution.
    """

    shape: tuple[int, ...]
    is_transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        first, second, *rest = self.shape
        if self.is_transposed:
            return second, first * math.prod(rest)
        return first, second * math.prod(rest)

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The initializer as a matrix; a view where memory allows."""
        return (parameter.transpose(0, 1) if self.is_transposed else parameter).flatten(1)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of ``to_matrix``."""
        if not self.is_transposed:
            return matrix.reshape(self.shape)
        first, second, *rest = self.shape
        return matrix.reshape(second, first, *rest).transpose(0, 1)
