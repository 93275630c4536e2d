"""What a module that scales every channel does to the space of its input, found by trying."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

_MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class NormKind:
    """A norm: its input turned gives its output turned, once its scale is taken away.

    Args:
        is_centred: It multiplies by one plus its weight.
        keeps_mean: It also subtracts the mean, so only rotations that keep ``(1, 1, ...)`` commute with it.
        has_weight: It has a scale for each channel.
        has_bias: And it adds a bias.
    """

    is_centred: bool
    keeps_mean: bool
    has_weight: bool = True
    has_bias: bool = False


@torch.no_grad()
def norm_kind(module: nn.Module, x: Tensor) -> NormKind | None:
    """What ``module`` is, tried on ``x``; ``None`` for no norm.

    Args:
        module: Any.
        x: ``(..., channels)`` what it gets.
    """
    width = x.shape[-1] if x.ndim else 0
    given = {name: p for name, p in module._parameters.items() if p is not None}
    if not set(given) <= {"weight", "bias"} or any(tuple(p.shape) != (width,) for p in given.values()):
        return None
    if module._modules or width < 2 or not (given or type(module).__name__.endswith("Norm")):
        return None
    rows = x.detach().reshape(-1, width)[:_MOST_ROWS].float()
    for is_centred in (False, True) if "weight" in given else (False,):
        trial = _Trial(module, given, is_centred)
        if not trial.is_scaled_by_weight(rows):
            continue
        for keeps_mean in (False, True):
            if trial.commutes(rows, keeps_mean=keeps_mean):
                return NormKind(is_centred, keeps_mean, "weight" in given, "bias" in given)
    return None


class _Trial:
    def __init__(self, module: nn.Module, given: dict[str, nn.Parameter], is_centred: bool) -> None:
        self._module = module
        self._given = {name: p.detach().float() for name, p in given.items()}
        neutral = {"weight": 0.0 if is_centred else 1.0, "bias": 0.0}
        self._neutral = {name: torch.full_like(p, neutral[name]) for name, p in self._given.items()}
        self._shift = 1.0 if is_centred else 0.0

    def _run(self, parameters: dict[str, Tensor], rows: Tensor) -> Tensor | None:
        try:
            found = functional_call(self._module, parameters, (rows,))
        except (RuntimeError, TypeError, ValueError):
            return None
        return found.float() if isinstance(found, Tensor) and found.shape == rows.shape else None

    def is_scaled_by_weight(self, rows: Tensor) -> bool:
        """Whether the weight and the bias do nothing but scale and shift channels."""
        plain, real = self._run(self._neutral, rows), self._run(self._given, rows)
        if plain is None or real is None:
            return False
        expected = plain
        if "weight" in self._given:
            expected = expected * (self._given["weight"] + self._shift)
        if "bias" in self._given:
            expected = expected + self._given["bias"]
        return _close(real, expected)

    def commutes(self, rows: Tensor, *, keeps_mean: bool) -> bool:
        """Whether reflecting the input reflects the output; the reflection keeps the mean where asked."""
        v = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(3)).to(rows.device)
        if keeps_mean:
            v = v - v.mean()
        v = v / v.norm()
        plain, turned = self._run(self._neutral, rows), self._run(self._neutral, _reflected(rows, v))
        changes = bool((plain - rows).abs().max() > 1e-3 * rows.abs().max()) if plain is not None else False
        return changes and plain is not None and turned is not None and _close(turned, _reflected(plain, v))


def _reflected(rows: Tensor, v: Tensor) -> Tensor:
    return rows - 2 * (rows @ v).unsqueeze(-1) * v


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())
