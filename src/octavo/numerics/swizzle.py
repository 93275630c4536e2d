"""Block scales in the order in which block-scaled tensor cores read them. docs/formats/swizzle.md is the page.

Source: cuBLAS documentation, "1D block scaling factors layout" (CUDA 12.8): tiles of 128 rows and 4 scales, 512 bytes
each, row by row; inside a tile the scale of row ``r`` and column ``c`` is byte ``(r % 32) * 16 + (r // 32) * 4 + c``.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS, TILE_COLS = 128, 4
_QUARTER = TILE_ROWS // 4  # rows that share a 16-byte line


def swizzle_scales(scales: Tensor) -> Tensor:
    """Row-major block scales as tiles.

    Args:
        scales: ``(..., rows, cols)`` codes of one byte each, one for every block of a row (E4M3 or E8M0, any dtype).

    Returns:
        ``(..., ceil(rows / 128) * ceil(cols / 4) * 512)`` of the same dtype; what fills up a tile is 0.

    >>> import torch
    >>> swizzle_scales(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8))[:18].tolist()
    [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4]
    """
    rows, cols = scales.shape[-2:]
    filled = pad(scales, (0, -cols % TILE_COLS, 0, -rows % TILE_ROWS))
    tall, wide = _tiles(rows, cols)
    # (tile row, quarter, row in quarter, tile column, column)
    split = filled.reshape(*scales.shape[:-2], tall, 4, _QUARTER, wide, TILE_COLS)
    return split.movedim((-5, -2, -3, -4), (-5, -4, -3, -2)).flatten(-5)


def unswizzle_scales(tiles: Tensor, rows: int, cols: int) -> Tensor:
    """The ``(..., rows, cols)`` scales that ``swizzle_scales`` took; what filled up the tiles is dropped.

    Raises:
        ValueError: ``tiles`` has another number of bytes than ``rows`` and ``cols`` need.
    """
    tall, wide = _tiles(rows, cols)
    expected = tall * wide * TILE_ROWS * TILE_COLS
    if tiles.shape[-1] != expected:
        raise ValueError(f"scales of {rows} rows and {cols} columns fill {expected} places, not {tiles.shape[-1]}")
    split = tiles.reshape(*tiles.shape[:-1], tall, wide, _QUARTER, 4, TILE_COLS)
    filled = split.movedim((-5, -4, -3, -2), (-5, -2, -3, -4))
    return filled.reshape(*tiles.shape[:-1], tall * TILE_ROWS, wide * TILE_COLS)[..., :rows, :cols]


def _tiles(rows: int, cols: int) -> tuple[int, int]:
    return math.ceil(rows / TILE_ROWS), math.ceil(cols / TILE_COLS)
