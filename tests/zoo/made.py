"""What a model of the zoo is: a factory that gives a module and one batch; and how it comes alive."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]


def ids(*shape: int) -> torch.Tensor:
    """Token numbers that are no special ones."""
    return torch.randint(3, 50, shape)


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Random weights of a size at which every part of a tiny model has a say, those that start at zero included."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter.shape[-1] if parameter.dim() == 3 else math.prod(parameter.shape[1:])
            parameter.normal_(0, 1 / math.sqrt(fan_in))
        elif float(parameter.abs().max()) < 1e-2:  # biases, layer scales, gates
            parameter.normal_(0, 0.3)
    return model.eval()
