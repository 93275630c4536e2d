"""Between torch and numpy, bf16 and float8 included, and tensors out of nested outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

_NARROW: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same values and dtype as an array."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _NARROW:
        carrier, dtype = _NARROW[tensor.dtype]
        return tensor.view(carrier).numpy().view(dtype)
    return tensor.numpy()


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """The same values and dtype as a tensor."""
    array = np.array(array)  # a copy: torch wants to write
    for dtype, (_, numpy_dtype) in _NARROW.items():
        if array.dtype == np.dtype(numpy_dtype):
            carrier = np.int16 if dtype is torch.bfloat16 else np.uint8
            return torch.from_numpy(array.view(carrier)).view(dtype)
    return torch.from_numpy(array)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in nested tuples, lists and mappings, in order."""
    match value:
        case Tensor():
            if value.is_floating_point():
                yield value
        case Mapping():
            for item in value.values():
                yield from tensors_in(item)
        case tuple() | list():
            for item in value:
                yield from tensors_in(item)
