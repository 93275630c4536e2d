"""Codes of a weight in the layout that a graph stores: scales along an axis or in blocks, axes moved on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from octavo.numerics.arrays import array_of
from octavo.numerics.qtensor import QTensor
from octavo.onnx.fake_quantize import permutation, reshaped
from octavo.spec.element import IntFormat
from octavo.spec.tensor_format import PerChannel, PerGroup, PerTensor, PerTile, TensorFormat


@dataclass(frozen=True, slots=True)
class ScaleCodes:
    """Scales that are codes themselves; ``outer`` scales them, ``None`` where they stand for themselves."""

    codes: np.ndarray[Any, Any]
    fmt: TensorFormat
    outer: np.ndarray[Any, Any] | None

    def moved(self, move: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> ScaleCodes:
        """The same with axes moved."""
        return ScaleCodes(move(self.codes), self.fmt, self.outer)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Codes in the layout that is written.

    Args:
        codes: Of any shape.
        scale: One, one for each index of ``axis``, or (``block``) one for ``block`` neighbours along it.
        zero_point: Of the scale's shape.
        fmt: What it means.
        axis: ``None`` for one scale.
        block: 0 for one scale for each index.
        order: Axes of the matrix in the order in which they are stored, for a reader that compares.
    """

    codes: np.ndarray[Any, Any]
    scale: np.ndarray[Any, Any] | ScaleCodes
    zero_point: np.ndarray[Any, Any] | None
    fmt: TensorFormat
    axis: int | None
    block: int
    order: tuple[int, ...]

    @classmethod
    def of(cls, q: QTensor) -> StoredWeight:
        """A quantized matrix, tiles as groups that repeat from row to row."""
        granularity, order = q.format.granularity, tuple(range(q.codes.ndim))
        match granularity:
            case PerTensor():
                axis, block = None, 0
            case PerChannel():
                axis, block = 0, 0
            case PerGroup(size):
                axis, block = 1, size
            case PerTile(_, cols):
                axis, block = 1, cols
            case _:
                raise AssertionError(f"{granularity} was to be refused before")

        def rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if isinstance(granularity, PerTile):
                return array.repeat(granularity.rows, axis=0)[: q.shape[0]]
            return array

        points = None if q.zero_point is None else rows(array_of(q.zero_point))
        return cls(array_of(q.codes), _scale_arrays(q, rows), points, q.format, axis, block, order)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales, or of their codes."""
        return (self.scale.codes if isinstance(self.scale, ScaleCodes) else self.scale).shape

    def through(self, node: ir.Node, value: ir.Value) -> StoredWeight | None:
        """The same behind ``node``; ``None`` where it does more than move axes."""
        if node.op_type == "Gemm" and node.inputs[1] is value and node.attributes.get("transB") is not None:
            return self._transposed((1, 0)) if node.attributes["transB"].as_int() else None
        if node.domain or node.inputs[0] is not value:
            return None
        if node.op_type == "Transpose":
            return self._transposed(permutation(node, self.codes.ndim))
        if node.op_type not in ("Reshape", "Flatten", "Identity"):
            return None
        codes = reshaped(self.codes, node)
        if codes is None:
            return None
        if codes.shape == self.codes.shape:
            return self
        keeps_rows = codes.shape[0] == self.codes.shape[0] and self.axis in (None, 0) and not self.block
        if not keeps_rows or self.order != tuple(range(len(self.order))):
            return None
        order = tuple(range(codes.ndim))
        return StoredWeight(codes, self.scale, self.zero_point, self.fmt, self.axis, 0, order)

    def _transposed(self, axes: tuple[int, ...]) -> StoredWeight:
        def move(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return array.transpose(axes) if self.block else array

        scale = self.scale.moved(move) if isinstance(self.scale, ScaleCodes) else move(self.scale)
        return StoredWeight(
            self.codes.transpose(axes),
            scale,
            None if self.zero_point is None else move(self.zero_point),
            self.fmt,
            None if self.axis is None else axes.index(self.axis),
            self.block,
            tuple(self.order[axis] for axis in axes),
        )


def _scale_arrays(q: QTensor, rows: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Any:
    """Scales as they are written; where codes count in another unit than 1, their real values times it."""
    scale, element = q.scale, q.format.element
    unit = element.unit if isinstance(element, IntFormat) else 1.0
    if isinstance(scale, QTensor) and unit == 1.0:
        outer = None if scale.scale is None else array_of(scale.scale)  # type: ignore[arg-type]
        return ScaleCodes(rows(array_of(scale.codes)), scale.format, outer)
    assert scale is not None
    real = scale.dequantize() if isinstance(scale, QTensor) else scale
    return rows(array_of(real * unit))
