"""Weights as ``numerics`` sees them: ``(..., out_features, in_features)``.

The same rule serves every parameter: swap the first two axes where inputs come first, then flatten what
follows the first axis. It is what ``weight_shape`` and ``is_transposed`` mean in files, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightView:
    """How a parameter becomes a matrix and back.

    Args:
        shape: Shape of the parameter.
        is_transposed: Stored with the input axis first (transposed convolutions, transformers' Conv1D).
    """

    shape: tuple[int, ...]
    is_transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``; an output of a convolution sees ``in_channels / groups * kernel`` inputs."""
        first, second, *rest = self.shape
        if self.is_transposed:
            return second, first * math.prod(rest)
        return first, second * math.prod(rest)

    def to_matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as ``matrix_shape``; a view where memory allows."""
        if self.is_transposed:
            parameter = parameter.transpose(0, 1)
        return parameter.flatten(1)

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of ``to_matrix``."""
        if not self.is_transposed:
            return matrix.reshape(self.shape)
        first, second, *rest = self.shape
        return matrix.reshape(second, first, *rest).transpose(0, 1)
