"""Weights that engines join into one product (q, k, v; gate, up) must agree in what is stored once per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from octavo.nn.quantizer import WeightQuantizer
from octavo.spec.tensor_format import TensorFormat

Member = tuple[WeightQuantizer, Tensor]


@torch.no_grad()
def shared_amaxes(groups: Iterable[Sequence[Member]]) -> dict[WeightQuantizer, Tensor]:
    """The largest magnitude over all weights of a group, for each whose format has one scale per tensor for its scales.

    Args:
        groups: Weights of layers that read the same tensor, with their quantizers.
    """
    found: dict[WeightQuantizer, Tensor] = {}
    for members in groups:
        by_format: dict[TensorFormat, list[Member]] = {}
        for quantizer, weight in members:
            if quantizer.spec.format.shares_outer_scale and weight.numel():
                by_format.setdefault(quantizer.spec.format, []).append((quantizer, weight))
        for alike in by_format.values():
            if len(alike) > 1:
                largest = torch.stack([weight.abs().amax().float() for _, weight in alike]).amax()
                found |= {quantizer: largest.to(weight.device) for quantizer, weight in alike}
    return found


def fixed_outers(groups: Iterable[Sequence[Member]]) -> dict[WeightQuantizer, Tensor]:
    """The scale of scales that an algorithm gave one of a group, for the others of the same format."""
    found: dict[WeightQuantizer, Tensor] = {}
    for members in groups:
        known = {q.spec.format: q.fixed_outer for q, _ in members if q.fixed_outer is not None}
        for quantizer, _ in members:
            outer = known.get(quantizer.spec.format)
            if outer is not None and not quantizer.is_fixed:
                found[quantizer] = outer
    return found
