"""Outlier channels as large models have them, planted without changing what a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


@torch.no_grad()
def plant(pairs: Iterable[tuple[nn.Module, Sequence[nn.Linear]]], *, factor: float = 50.0, share: float = 0.01) -> None:
    """Scale a share of each norm's channels up, and the columns of the layers that read it down.

    Args:
        pairs: Each norm with a ``weight``, and every layer that reads its output.
        factor: How much larger the outliers are.
        share: Of the channels; at least one.
    """
    generator = torch.Generator().manual_seed(11)
    for norm, readers in pairs:
        width = readers[0].in_features
        chosen = torch.randperm(width, generator=generator)[: max(1, round(share * width))]
        for name in ("weight", "bias"):
            part = getattr(norm, name, None)
            if part is not None:
                part[chosen] *= factor
        for reader in readers:
            reader.weight[:, chosen] /= factor
