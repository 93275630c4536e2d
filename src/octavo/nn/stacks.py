"""Stacks of weights (experts in one tensor), taken apart into the matrices that algorithms see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.backends.simulate import loops_for
from octavo.nn.block_layers import BlockLayer
from octavo.nn.quantizer import ActivationQuantizer
from octavo.numerics.block import matrix_name
from octavo.numerics.qtensor import QTensor, fake_quantize, quantize
from octavo.numerics.scale_search import search_scales
from octavo.spec.experts import format_of_matrix
from octavo.spec.plan import QuantizerSpec
from octavo.spec.tensor_format import TensorFormat


class Stack:
    """One parameter ``(num_matrices, ...)`` with a weight quantizer.

    Args:
        layer: The site, for which ``takes_apart`` is true.
    """

    def __init__(self, layer: BlockLayer) -> None:
        fmt = format_of_matrix(layer.quantizer.spec.format)
        assert fmt is not None
        self.layer = layer
        self.spec = replace(layer.quantizer.spec, format=fmt)
        self.codes: list[QTensor | None] = [None] * layer.quantizer.view.matrix_shape[0]
        self.with_branch: set[int] = set()
        self.matrices = [StackedMatrix(self, index) for index in range(len(self.codes))]

    def set_low_rank(self, index: int, a: Tensor, b: Tensor) -> None:
        """A branch beside one matrix; those without one have branches of zeros."""
        count, (out_features, in_features) = len(self.codes), self.matrices[index].matrix.shape
        if self.layer.branch is None:
            rank = a.shape[0]
            self.layer.set_branch(a.new_zeros(count, rank, in_features), b.new_zeros(count, out_features, rank))
        branch = self.layer.branch
        assert branch is not None
        branch.a[index], branch.b[index] = a, b
        self.with_branch.add(index)

    @property
    def is_touched(self) -> bool:
        """Some of its matrices are fixed."""
        return any(codes is not None for codes in self.codes)

    def rounded(self) -> Tensor:
        """``(num_matrices, out_features, in_features)``, every matrix that is not fixed rounded to nearest."""
        return torch.stack([matrix.rounded() for matrix in self.matrices])

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the stack where any matrix is: the others are rounded to nearest, with the range that the rule finds."""
        if self.is_touched and not self.layer.quantizer.is_fixed:
            pairs = zip(self.matrices, self.codes, strict=True)
            codes = [matrix.nearest() if known is None else known for matrix, known in pairs]
            self.layer.quantizer.fix(self.layer.parameter, stacked(codes, self.layer.quantizer.spec.format))


@dataclass(frozen=True, slots=True, eq=False)
class StackedMatrix:
    """One matrix of a stack, in the shape of a ``BlockLayer`` as far as algorithms go."""

    stack: Stack
    index: int

    @property
    def name(self) -> str:
        """``<site>[<index>]``."""
        return matrix_name(self.stack.layer.name, self.index)

    @property
    def matrix(self) -> Tensor:
        """``(out_features, in_features)`` view of it."""
        return self.stack.layer.matrix[self.index]

    @property
    def bias(self) -> None:
        """Those of experts are not looked for."""

    @property
    def spec(self) -> QuantizerSpec:
        """What the plan gives it."""
        return self.stack.spec

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        """The site's."""
        return self.stack.layer.input_quantizer

    @property
    def takes_scale(self) -> bool:
        """Its input is the experts' own business."""
        return False

    @property
    def takes_bias(self) -> bool:
        """See ``bias``."""
        return False

    @property
    def takes_low_rank(self) -> bool:
        """The call takes the branches of all matrices, and it has none yet."""
        return self.stack.layer.takes_low_rank and self.index not in self.stack.with_branch

    @property
    def is_fixed(self) -> bool:
        """An algorithm has rounded it."""
        return self.stack.codes[self.index] is not None

    @property
    def fixed_outer(self) -> Tensor | None:
        """The scale of its scales, where it is fixed: no other weight needs to agree with it."""
        return None

    def write(self, value: Tensor) -> None:
        """Replace it."""
        with torch.no_grad():
            self.matrix.copy_(value)

    def fix(self, value: QTensor) -> None:
        """Its codes from now on."""
        self.write(value.dequantize(self.matrix.dtype))
        self.stack.codes[self.index] = value

    def nearest(self) -> QTensor:
        """Its codes when it is rounded to nearest."""
        matrix, fmt = self.matrix, self.spec.format
        if self.spec.observer.name != "mse":
            return quantize(matrix, fmt)
        scale, zero_point = search_scales(matrix, fmt)
        return quantize(matrix, fmt, scale=scale, zero_point=zero_point)

    def rounded(self) -> Tensor:
        """As it will be, as far as that is known: fixed, or rounded to nearest by its largest value."""
        matrix, fmt = self.matrix, self.spec.format
        return matrix if self.is_fixed else fake_quantize(matrix, fmt, loops=loops_for(matrix, fmt))


def takes_apart(layer: BlockLayer) -> bool:
    """Whether a site is a stack of matrices each of which has scales of its own."""
    shape = layer.quantizer.view.matrix_shape
    is_stack = layer.quantizer.operation == "linear" and len(shape) == 3 and layer.quantizer.view.num_stacked == 1
    return is_stack and format_of_matrix(layer.quantizer.spec.format) is not None


def stacked(parts: list[QTensor], fmt: TensorFormat) -> QTensor:
    """One QTensor of format ``fmt`` made of matrices in ``format_of_matrix(fmt)``."""

    def level(values: list[Tensor | QTensor | None], of: TensorFormat | None) -> Tensor | QTensor | None:
        if of is None or values[0] is None:
            return None
        if isinstance(values[0], QTensor):
            return stacked([value for value in values if isinstance(value, QTensor)], of)
        return torch.stack([value for value in values if isinstance(value, Tensor)])

    points = [part.zero_point for part in parts if part.zero_point is not None]
    return QTensor(
        torch.stack([part.codes for part in parts]),
        level([part.scale for part in parts], fmt.scale),
        fmt,
        (len(parts), *parts[0].shape),
        torch.stack(points) if points else None,
        level([part.offset for part in parts], fmt.offset),
    )
