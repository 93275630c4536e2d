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


@torch.no_grad()
def plant_experts(model: nn.Module, *, factor: float = 50.0, share: float = 1 / 16) -> None:
    """Scale a share of what experts of a Mixtral-like model read up, and of what their second matrices read."""
    generator = torch.Generator().manual_seed(11)

    def chosen(width: int) -> torch.Tensor:
        return torch.randperm(width, generator=generator)[: max(1, round(share * width))]

    for layer in model.get_submodule("model.layers"):  # type: ignore[union-attr]
        own = dict(layer.named_parameters())
        up, down = own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"]
        outside, inside = chosen(up.shape[2]), chosen(down.shape[2])
        own["post_attention_layernorm.weight"][outside] *= factor
        own["mlp.gate.weight"][:, outside] /= factor
        up[:, :, outside] /= factor
        up[:, down.shape[2] + inside] *= factor
        down[:, :, inside] /= factor
