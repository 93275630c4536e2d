"""Layers that are something else than their class says: routers of experts, adapters beside a frozen layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from octavo.nn.experts import ExpertLayer
from octavo.spec.facts import Role, SiteFacts

_TUNER = "BaseTunerLayer"
"""What every layer of peft that stands around a frozen one derives from; the frozen one is its ``base_layer``."""


def with_role(facts: SiteFacts, module: str, model: nn.Module, experts: Sequence[ExpertLayer]) -> SiteFacts:
    """``facts`` with what the layer is for, where that is not just to compute.

    Args:
        facts: Of one site.
        module: Path of the module that computes there.
        model: The whole model.
        experts: Its layers of experts.
    """
    if is_adapter(model, module):
        return replace(facts, role=Role.ADAPTER)
    if len(facts.weight_shape) == 2 and any(_routes(facts, module, layer) for layer in experts):
        return replace(facts, role=Role.ROUTER)
    return facts


def _routes(facts: SiteFacts, module: str, experts: ExpertLayer) -> bool:
    """One output for each expert, in the module that holds the experts, but not in them."""
    around, _, _ = experts.path.rpartition(".")
    is_inside = module == experts.path or module.startswith(f"{experts.path}.")
    return facts.weight_shape[0] == experts.count and module.startswith(f"{around}.") and not is_inside


def is_adapter(model: nn.Module, module: str) -> bool:
    """Whether ``module`` is a part of a peft layer that is not the layer around which it was put."""
    current, parts = model, module.split(".")
    for depth, part in enumerate(parts):
        is_tuner = any(base.__name__ == _TUNER for base in type(current).__mro__)
        if is_tuner and part != "base_layer":
            return True
        if part not in current._modules or current._modules[part] is None:
            return False
        current = current.get_submodule(part)
        if depth == len(parts) - 1:
            return False
    return False
