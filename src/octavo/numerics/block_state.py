"""What work on a block has changed, as tensors by name and plain facts, so that it can wait on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from octavo.numerics.qtensor import QTensor
from octavo.spec.tensor_format import PLAIN_FP32, Shape, TensorFormat


@dataclass(frozen=True, slots=True)
class BlockState:
    """A settled block.

    Args:
        tensors: By names that only the block's own wing understands; any dtype.
        facts: Plain JSON values.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


def named_parts(name: str, tensor: QTensor) -> Iterator[tuple[str, Tensor]]:
    """Codes and scales of ``tensor``, unpacked."""
    yield f"{name}.codes", tensor.codes
    if tensor.zero_point is not None:
        yield f"{name}.zero_point", tensor.zero_point
    for level, part in (("scale", tensor.scale), ("offset", tensor.offset)):
        if isinstance(part, QTensor):
            yield from named_parts(f"{name}.{level}", part)
        elif part is not None:
            yield f"{name}.{level}", part


def from_parts(name: str, fmt: TensorFormat, shape: Shape, tensors: Mapping[str, Tensor]) -> QTensor:
    """The QTensor of ``shape`` whose ``named_parts`` are among ``tensors``."""

    def level(part: str, of: TensorFormat | None, part_shape: Shape) -> Tensor | QTensor | None:
        if of is None:
            return None
        below = f"{name}.{part}"
        return tensors[below] if of == PLAIN_FP32 else from_parts(below, of, part_shape, tensors)

    return QTensor(
        tensors[f"{name}.codes"],
        level("scale", fmt.scale, fmt.granularity.scale_shape(shape)),
        fmt,
        shape,
        tensors.get(f"{name}.zero_point"),
        level("offset", fmt.offset, fmt.offset_blocks.scale_shape(shape)),
    )
