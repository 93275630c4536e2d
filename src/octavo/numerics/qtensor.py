"""QTensor: codes with their scales."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class QTensor:
    """A quantized tensor, unpacked: ``real = scale * (value(codes) - zero_point) + offset``.

    Args:
        codes: One code per value, of ``shape``: int8 for signed integers, uint8 for unsigned integers and
            codebooks, and the bit pattern in uint8 for small floats.
        scale: Of ``format.granularity.scale_shape(shape)``; itself a QTensor where the scales are quantized.
        format: What it all means.
        shape: Shape of the values.
        zero_point: Integers of the scale's shape (int8 or uint8), ``None`` when symmetric.
        offset: Of the scale's shape, ``None`` without one.
    """

    codes: Tensor
    scale: Tensor | QTensor | None
    format: TensorFormat
    shape: tuple[int, ...]
    zero_point: Tensor | None = None
    offset: Tensor | QTensor | None = None
