"""A QTensor as named tensors of a file, and back: the naming of the run directory.

``<key>.codes``, ``<key>.scale``, ``<key>.zero_point``, ``<key>.offset``; where scales are quantized themselves, their
parts hang below: ``<key>.scale.codes``, ``<key>.scale.scale``. Packed codes are uint8, rows padded to bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from octavo.backends.codes import pack
from octavo.errors import UserError
from octavo.numerics.packing import unpack
from octavo.numerics.qtensor import QTensor
from octavo.spec.element import ElementFormat, IntFormat
from octavo.spec.tensor_format import PLAIN_FP32, Shape, TensorFormat

Read = Callable[[str], Tensor]


def qtensor_parts(key: str, tensor: QTensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write for ``tensor``, with their names."""
    yield f"{key}.codes", _packed(tensor.codes, tensor.format.element)
    for name, part in (("scale", tensor.scale), ("offset", tensor.offset)):
        if isinstance(part, QTensor):
            yield from qtensor_parts(f"{key}.{name}", part)
        elif part is not None:
            yield f"{key}.{name}", part
    if tensor.zero_point is not None:
        assert tensor.format.zero_point is not None
        yield f"{key}.zero_point", _packed(tensor.zero_point, tensor.format.zero_point)


def read_qtensor(key: str, fmt: TensorFormat, shape: Shape, read: Read) -> QTensor:
    """The QTensor of ``shape`` that ``qtensor_parts`` wrote.

    Raises:
        UserError: a part is missing, or has another shape or dtype than the format says.
    """
    scale_shape = fmt.granularity.scale_shape(shape)
    zero_point = None
    if fmt.zero_point is not None:
        zero_point = _unpacked(f"{key}.zero_point", fmt.zero_point, scale_shape, read)
    return QTensor(
        codes=_unpacked(f"{key}.codes", fmt.element, shape, read),
        scale=_read_part(f"{key}.scale", fmt.scale, scale_shape, read),
        format=fmt,
        shape=shape,
        zero_point=zero_point,
        offset=_read_part(f"{key}.offset", fmt.offset, fmt.offset_blocks.scale_shape(shape), read),
    )


def qtensor_names(key: str, fmt: TensorFormat) -> Iterator[str]:
    """The names that ``qtensor_parts`` uses."""
    yield f"{key}.codes"
    for name, part in (("scale", fmt.scale), ("offset", fmt.offset)):
        if part == PLAIN_FP32:
            yield f"{key}.{name}"
        elif part is not None:
            yield from qtensor_names(f"{key}.{name}", part)
    if fmt.zero_point is not None:
        yield f"{key}.zero_point"


def _read_part(key: str, fmt: TensorFormat | None, shape: Shape, read: Read) -> Tensor | QTensor | None:
    if fmt is None:
        return None
    if fmt != PLAIN_FP32:
        return read_qtensor(key, fmt, shape, read)
    return _checked(key, read(key), torch.float32, shape)


def _packed(codes: Tensor, element: ElementFormat) -> Tensor:
    """``(..., ceil(n * bits / 8))`` uint8; 16 and 32 bit elements as they are."""
    if element.bits > 8:
        return codes
    return pack(codes.reshape(codes.shape or (1,)).contiguous(), element.bits).reshape(
        _packed_shape(codes.shape, element)
    )


def _unpacked(key: str, element: ElementFormat, shape: Shape, read: Read) -> Tensor:
    stored = read(key)
    if element.bits > 8:
        wide = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[element.name]
        return _checked(key, stored, wide, shape)
    packed = _checked(key, stored, torch.uint8, _packed_shape(shape, element))
    rows = packed.reshape(packed.shape or (1,))
    is_signed = isinstance(element, IntFormat) and element.is_signed
    return unpack(rows, element.bits, shape[-1] if shape else 1, signed=is_signed).reshape(shape)


def _packed_shape(shape: Shape, element: ElementFormat) -> Shape:
    return (*shape[:-1], math.ceil(shape[-1] * element.bits / 8)) if shape else ()


def _checked(key: str, tensor: Tensor, dtype: torch.dtype, shape: Shape) -> Tensor:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, and its format says {dtype} {tuple(shape)}: "
            "the run directory is damaged; write it again"
        )
    return tensor
