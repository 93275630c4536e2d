"""What a convolution sees of its input, window by window."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a convolution moves over its input, one entry for each spatial axis.

    Args:
        padding: At the low and at the high end of every axis.
        stride: Steps between windows.
        dilation: Steps inside a window.
        groups: Of channels.
    """

    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def windows(x: Tensor, kernel: tuple[int, ...], geometry: Geometry, pad_value: float = 0) -> Tensor:
    """``(batch, channels, *spatial)`` as ``(batch, channels, *moved, *kernel)``: a view of the padded input.

    >>> import torch
    >>> windows(torch.arange(4).view(1, 1, 4), (2,), Geometry(((0, 0),), (1,), (2,)))[0, 0].tolist()
    [[0, 2], [1, 3]]
    """
    ends = [end for pair in reversed(geometry.padding) for end in pair]
    seen = F.pad(x, ends, value=pad_value)
    for axis, (size, step, spread) in enumerate(zip(kernel, geometry.stride, geometry.dilation, strict=True), 2):
        seen = seen.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    return seen
