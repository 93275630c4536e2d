"""Scales of a layer's weight as an algorithm asks for them: by one of three measures, and agreed where engines fuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.numerics.block import Block, InputGroup
from octavo.numerics.qtensor import QTensor
from octavo.numerics.rescaling import Judge, Mixture, Reader, Rescaling
from octavo.numerics.scale_search import outer_scale, search_scales
from octavo.numerics.statistics import InputStatistics, Need
from octavo.numerics.weighting import PLAIN, Weighting
from octavo.spec.tensor_format import PLAIN_FP32, PerTensor, TensorFormat

Measure = Literal["plain", "importance", "gram"]


def needs_of(measure: Measure) -> frozenset[Need]:
    """What has to be gathered to measure errors so."""
    match measure:
        case "plain":
            return frozenset()
        case "importance":
            return frozenset({Need.MEAN_SQUARE})
        case "gram":
            return frozenset({Need.GRAM})


def group_of(block: Block, layer: str) -> InputGroup:
    """The layers that read the same tensor as ``layer``."""
    return next(group for group in block.groups() if layer in group.layers)


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """What the layers of a group read: one tensor, or each expert rows of its own.

    Args:
        parts: Layers that read the same, and its statistics; those that no row reached only where none was reached.
    """

    parts: tuple[tuple[tuple[str, ...], InputStatistics], ...]

    @classmethod
    def of(cls, block: Block, group: InputGroup) -> Readings:
        """Of a group of ``block``."""
        wanted = set(group.layers)
        alike = (tuple(name for name in found.layers if name in wanted) for found in block.groups())
        every = [names for names in alike if names]
        seen = [
            (names, known) for names in every if (known := block.statistics(names[0])).count and not known.is_assumed
        ]
        return cls(tuple(seen or [(names, block.statistics(names[0])) for names in every]))

    @property
    def amax(self) -> Tensor:
        """``(in_features,)`` largest absolute value of every channel."""
        return torch.stack([known.amax for _, known in self.parts]).amax(0)

    @property
    def mean_square(self) -> Tensor:
        """``(in_features,)`` mean square of every channel over all rows."""
        if len(self.parts) == 1:
            return self.parts[0][1].mean_square
        total = sum(known.count for _, known in self.parts)
        return torch.stack([known.mean_square * (known.count / max(1, total)) for _, known in self.parts]).sum(0)

    def judge(self, block: Block, gram: Callable[[InputStatistics], Tensor], *, is_searched: bool = False) -> Judge:
        """Judges factors for all layers, each by what it reads.

        Args:
            block: Whose layers they are.
            gram: ``(I, I)`` mean of ``x^T x`` of statistics, or ``(I,)`` its diagonal.
            is_searched: See ``Rescaling``.
        """
        total = sum(known.count for _, known in self.parts)
        num_readers = sum(len(names) for names, _ in self.parts)
        judges: list[tuple[float, Judge]] = []
        for names, known in self.parts:
            spec = block.input_spec(names[0])
            readers = [
                Reader.of(
                    block.read_weight(name),
                    block.weight_spec(name).format,
                    num_readers=num_readers,
                    is_searched=is_searched,
                )
                for name in names
            ]
            fmt = None if spec is None else spec.format
            judge = Rescaling(readers, gram(known), self.amax, fmt, is_searched)
            judges.append((known.count / max(1, total), judge))
        return judges[0][1] if len(judges) == 1 else Mixture(judges)


def why_not_searched(block: Block, layer: str, measure: Measure) -> str:
    """Why a layer's weight cannot be served by a search for scales; empty when it can."""
    weight, fmt = block.read_weight(layer), block.weight_spec(layer).format
    if fmt.scale is None or fmt.offset is not None:
        return f"scales of {fmt} are not searched: the format has none, or is centred"
    if weight.ndim != 2 and measure == "gram":
        return f"a weight of shape {tuple(weight.shape)} has no one Gram matrix"
    if measure == "gram" and block.statistics(layer).gram is None:
        return "no Gram matrix of its input was gathered"
    return "" if measure == "plain" or block.statistics(layer).count else "saw no calibration data"


def searched(block: Block, layer: str, measure: Measure) -> tuple[Tensor | QTensor, Tensor | None]:
    """``search_scales`` for a layer's weight as it is now.

    Layers of one group that have one scale of scales per tensor agree on it, because engines that fuse them need that.
    """
    statistics = block.statistics(layer) if measure != "plain" else None
    weighting = PLAIN
    if statistics is not None and measure == "gram":
        weighting = Weighting(gram=statistics.expected_gram)
    elif statistics is not None:
        weighting = Weighting(importance=statistics.mean_square)
    return search_scales(
        block.read_weight(layer), block.weight_spec(layer).format, weighting, outer=agreed_outer(block, layer)
    )


def agreed_outer(block: Block, layer: str) -> Tensor | None:
    """The scale of scales of all layers that read the same tensor in the same format; ``None`` where there is none."""
    fmt = block.weight_spec(layer).format
    if not _has_outer(fmt):
        return None
    fused = [name for name in group_of(block, layer).layers if block.weight_spec(name).format == fmt]
    known = (block.fixed_outer(name) for name in fused)
    outer = next((scale for scale in known if scale is not None), None)
    if outer is not None:
        return outer
    tops = [block.read_weight(name).abs().amax().float() for name in fused if block.read_weight(name).numel()]
    return outer_scale(torch.stack(tops).amax(), fmt) if tops else None


def _has_outer(fmt: TensorFormat) -> bool:
    scale = fmt.scale
    return scale is not None and isinstance(scale.granularity, PerTensor) and scale.scale == PLAIN_FP32
