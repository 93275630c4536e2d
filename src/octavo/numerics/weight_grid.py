"""The grid that each single weight may be rounded to, for solvers that go column by column.

Everything is ``(in_features, out_features)``: a column of the weight is then contiguous. Legend: I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.numerics.codec import round_owned
from octavo.numerics.qtensor import QTensor, quantize
from octavo.numerics.scaling import divisor, expand_scale, from_blocks, to_blocks
from octavo.spec.element import FloatFormat
from octavo.spec.tensor_format import PLAIN_FP32, PerChannel, PerGroup, PerTensor, TensorFormat


@dataclass(slots=True)
class WeightGrid:
    """``scale * (code - point)`` for every weight.

    Args:
        fmt: Format of the weight.
        shape: ``(out_features, in_features)``.
        scale: As stored.
        points: Zero points as stored, ``None`` for a symmetric format.
    """

    fmt: TensorFormat
    shape: tuple[int, ...]
    scale: Tensor | QTensor
    points: Tensor | None
    scale_IO: Tensor
    points_IO: Tensor | None

    @classmethod
    def of(
        cls, shape: tuple[int, ...], fmt: TensorFormat, scale: Tensor | QTensor, points: Tensor | None
    ) -> WeightGrid:
        """The grid of a weight of ``shape`` with these scales and zero points."""
        values = scale.dequantize() if isinstance(scale, QTensor) else scale.float()
        points_IO = None if points is None else _spread(points.float(), fmt, shape)
        return cls(fmt, shape, scale, points, _spread(values, fmt, shape), points_IO)

    def nearest_codes(self, values: Tensor, column: int) -> Tensor:
        """``(O,)`` code minus zero point of the grid points nearest to ``values`` in one column."""
        scaled = values / divisor(self.scale_IO[column])
        if self.points_IO is None:
            return round_owned(scaled, self.fmt.element)
        points = self.points_IO[column]
        return round_owned(scaled.round_().add_(points), self.fmt.element).sub_(points)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """``(O,)`` grid points nearest to ``values``."""
        return self.nearest_codes(values, column).mul_(self.scale_IO[column])

    @property
    def group_size(self) -> int:
        """Neighbours on the input axis that share a scale; all of them where a row has one."""
        return self.fmt.granularity.size if isinstance(self.fmt.granularity, PerGroup) else self.shape[-1]

    @property
    def has_free_scales(self) -> bool:
        """Each scale belongs to one run of one row and takes nearly any value: fp32, or E4M3 under one per tensor."""
        scale = self.fmt.scale
        assert scale is not None
        in_rows = isinstance(self.fmt.granularity, PerGroup) or self.fmt.granularity == PerChannel()
        under_one = isinstance(scale.granularity, PerTensor) and scale.scale == PLAIN_FP32
        is_float = isinstance(scale.element, FloatFormat) and scale.element.mantissa_bits > 0
        return in_rows and scale.offset is None and is_float and (scale.is_plain or under_one)

    def storable(self, values: Tensor) -> Tensor:
        """Scales as they come back from their format. Only where ``has_free_scales``."""
        assert self.fmt.scale is not None
        if not isinstance(self.scale, QTensor):
            return round_owned(values.clone(), self.fmt.scale.element)
        outer = self.scale.scale
        assert isinstance(outer, Tensor)
        return round_owned(values / outer, self.fmt.scale.element).mul_(outer)

    def stored_scale(self) -> Tensor | QTensor:
        """One scale per block again, after ``scale_IO`` was changed block by block."""
        blocks, dims = to_blocks(self.scale_IO.T.contiguous(), self.fmt.granularity)
        for dim in sorted((dim % blocks.ndim for dim in dims), reverse=True):
            blocks = blocks.select(dim, 0)
        values = blocks.contiguous()
        if not isinstance(self.scale, QTensor):
            return values
        assert isinstance(self.scale.scale, Tensor)
        return quantize(values, self.scale.format, scale=self.scale.scale)

    def codes(self, rounded_IO: Tensor) -> QTensor:
        """A weight that lies on the grid, as codes."""
        scale = self.stored_scale() if self.has_free_scales else self.scale
        return quantize(rounded_IO.T.contiguous(), self.fmt, scale=scale, zero_point=self.points)


def _spread(part: Tensor, fmt: TensorFormat, shape: tuple[int, ...]) -> Tensor:
    blocks, _ = to_blocks(torch.zeros(shape, device=part.device), fmt.granularity)
    return from_blocks(blocks + expand_scale(part, fmt.granularity, shape), fmt.granularity, shape).T.contiguous()
