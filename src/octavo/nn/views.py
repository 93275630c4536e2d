"""Weights as ``numerics`` sees them: ``(..., out_features, in_features)``.

The same rule serves every parameter: behind the axes of a stack (experts), swap two axes where inputs come first,
then flatten what follows the first of them. It is what ``weight_shape`` and ``is_transposed`` mean in files, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightView:
    """How a parameter becomes a matrix, or a stack of matrices, and back.

    Args:
        shape: Shape of the parameter.
        is_transposed: Stored with the input axis first (transposed convolutions, transformers' Conv1D).
        num_stacked: Leading axes that number matrices of their own (the experts of one parameter).
    """

    shape: tuple[int, ...]
    is_transposed: bool = False
    num_stacked: int = 0

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(..., out_features, in_features)``: ``in_channels / groups * kernel`` inputs in a convolution."""
        stack, (first, second, *rest) = self.shape[: self.num_stacked], self.shape[self.num_stacked :]
        if self.is_transposed:
            return *stack, second, first * math.prod(rest)
        return *stack, first, second * math.prod(rest)

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as ``matrix_shape``; a view where memory allows."""
        if self.is_transposed:
            parameter = parameter.transpose(self.num_stacked, self.num_stacked + 1)
        return parameter.flatten(self.num_stacked + 1)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of ``to_matrix``."""
        if not self.is_transposed:
            return matrix.reshape(self.shape)
        stack, (first, second, *rest) = self.shape[: self.num_stacked], self.shape[self.num_stacked :]
        return matrix.reshape(*stack, second, first, *rest).transpose(self.num_stacked, self.num_stacked + 1)
