"""Codes and bytes of weights by the fastest backend: the bits of ``numerics``."""

from __future__ import annotations

from torch import Tensor

from octavo.backends import compiled
from octavo.backends.simulate import loops_for
from octavo.numerics import packing, qtensor
from octavo.numerics.qtensor import QTensor
from octavo.spec.tensor_format import TensorFormat


def quantize(
    x: Tensor,
    fmt: TensorFormat,
    *,
    scale: Tensor | QTensor | None = None,
    zero_point: Tensor | None = None,
    outer_scale: Tensor | None = None,
) -> QTensor:
    """See ``numerics.qtensor.quantize``."""
    return qtensor.quantize(
        x, fmt, scale=scale, zero_point=zero_point, outer_scale=outer_scale, loops=loops_for(x, fmt)
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """See ``numerics.packing.pack``."""
    packed = compiled.pack(codes, bits)
    return packing.pack(codes, bits) if packed is None else packed
