"""Granularities: which values of a tensor share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from octavo.errors import UserError

Shape = tuple[int, ...]


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size}: a block holds at least one value")


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def scale_shape(self, shape: Shape) -> Shape:
        """Always ``()``."""
        return ()

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for every index of ``axis`` (and of the axes before it, such as experts).

    The default is the output axis of a weight ``(..., out_features, in_features)``.

    >>> PerChannel().scale_shape((8, 96)), PerChannel().scale_shape((4, 8, 96))
    ((8,), (4, 8))
    """

    axis: int = -2

    def scale_shape(self, shape: Shape) -> Shape:
        """The axes up to and including ``axis``."""
        return shape[: self.axis % len(shape) + 1] if len(shape) > 1 else shape

    def __str__(self) -> str:
        return "per channel" if self.axis == -2 else "per matrix" if self.axis == 0 else f"along axis {self.axis}"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale for every vector along the last axis.

    >>> PerToken().scale_shape((2, 7, 96))
    (2, 7)
    """

    def scale_shape(self, shape: Shape) -> Shape:
        """Every axis but the last."""
        return shape[:-1]

    def __str__(self) -> str:
        return "per token"


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for every ``size`` neighbours on the last axis.

    >>> PerGroup(32).scale_shape((8, 96))
    (8, 3)
    """

    size: int

    def __post_init__(self) -> None:
        _check_positive(size=self.size)

    def scale_shape(self, shape: Shape) -> Shape:
        """The last axis counted in groups, rounded up."""
        return (*shape[:-1], math.ceil(shape[-1] / self.size))

    def __str__(self) -> str:
        return f"groups of {self.size}"


@dataclass(frozen=True, slots=True)
class PerTile:
    """One scale for every ``rows`` x ``cols`` tile of the last two axes.

    >>> PerTile(128, 128).scale_shape((300, 256))
    (3, 2)
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        _check_positive(rows=self.rows, cols=self.cols)

    def scale_shape(self, shape: Shape) -> Shape:
        """The last two axes counted in tiles, rounded up."""
        return (*shape[:-2], math.ceil(shape[-2] / self.rows), math.ceil(shape[-1] / self.cols))

    def __str__(self) -> str:
        return f"tiles of {self.rows}x{self.cols}"


@dataclass(frozen=True, slots=True)
class PerFlatGroup:
    """One scale for every ``size`` neighbours of the flattened tensor (NF4, and its scales); the last may be fewer."""

    size: int

    def __post_init__(self) -> None:
        _check_positive(size=self.size)

    def scale_shape(self, shape: Shape) -> Shape:
        """One axis: the number of values counted in groups, rounded up."""
        return (math.ceil(math.prod(shape) / self.size),)

    def __str__(self) -> str:
        return f"flat groups of {self.size}"


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerTile | PerFlatGroup
_KINDS: dict[str, type] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "token": PerToken,
    "group": PerGroup,
    "tile": PerTile,
    "flat-group": PerFlatGroup,
}


def granularity_to_json(granularity: Granularity) -> dict[str, Any]:
    """``{"kind": "group", "size": 128}``."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(granularity, cls))
    return {"kind": kind, **{name: getattr(granularity, name) for name in granularity.__slots__}}


def granularity_from_json(data: dict[str, Any]) -> Granularity:
    """What ``granularity_to_json`` wrote.

    Raises:
        KeyError, TypeError: an unknown kind, or other sizes than it has.
    """
    sizes = dict(data)
    granularity: Granularity = _KINDS[sizes.pop("kind")](**sizes)
    return granularity
