"""Weights that are computed from other parameters: parametrizations, weight norm and spectral norm, old and new.

Such a weight is a function of parameters alone, so in a frozen model it is a constant. While the layer is quantized it
is a plain parameter with that value; what it was computed from waits in a child of the layer, which moves with the
model and is in no state dict, and comes back with ``restore``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from octavo.nn.waiting import Waiting

_CHILD = "octavo_computed"
_PARTS = "parametrizations"


class Computed(Waiting):
    """What a weight was computed from.

    Args:
        cls: The class that the layer had.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.cls = cls
        self.hooks: dict[int, Callable[..., Any]] = {}
        self.stored: tuple[str, ...] = ()


def sources_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that ``module.weight`` is computed from, by their keys; empty when it is no such weight."""
    if "weight" in module._parameters:
        return {}
    if parametrize.is_parametrized(module, "weight"):
        part = module.get_submodule(f"{_PARTS}.weight")
        return {f"{_PARTS}.weight.{name}": p for name, p in part.named_parameters()}
    names = ("weight_g", "weight_v", "weight_orig")
    found = {name: module._parameters[name] for name in names if module._parameters.get(name) is not None}
    return {name: p for name, p in found.items() if p is not None} if _weight_hooks(module) else {}


@torch.no_grad()
def computed_weight(module: nn.Module) -> Tensor:
    """The weight as it is in evaluation mode."""
    was_training = module.training
    module.eval()
    try:
        for hook in _weight_hooks(module).values():
            hook(module, None)
        weight: Any = module.weight
        return weight.detach().clone()
    finally:
        module.training = was_training


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a layer, stored or computed; ``None`` for none."""
    stored = module._parameters.get("weight")
    return computed_weight(module) if stored is None and sources_of(module) else stored


def _weight_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Old-style hooks that compute ``weight`` before every forward."""
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, WeightNorm | SpectralNorm) and hook.name == "weight"
    }


def obstacle_of(module: nn.Module) -> str:
    """Why a computed weight cannot become a plain one; empty when it can."""
    if _PARTS in module._modules and len(list(module.get_submodule(_PARTS).children())) > 1:
        return "several of its parameters are computed: remove the parametrizations first"
    return ""


def make_plain(module: nn.Module) -> None:
    """Give ``module`` its computed weight as a plain parameter, until ``restore``."""
    weight, sources = computed_weight(module), sources_of(module)
    kept = Computed(type(module))
    if _PARTS in module._modules:
        kept.add_module(_PARTS, module._modules.pop(_PARTS))
        module.__class__ = type(module).__mro__[1]
    else:
        kept.hooks = _weight_hooks(module)
        kept.stored = tuple(module._parameters)
        for name in sources:
            kept.register_parameter(name, module._parameters.pop(name))
        for key in kept.hooks:
            del module._forward_pre_hooks[key]
        module.__dict__.pop("weight", None)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=next(iter(sources.values())).requires_grad))
    module.add_module(_CHILD, kept)


def restore(module: nn.Module) -> None:
    """Undo ``make_plain``, if it was done."""
    kept = module._modules.get(_CHILD)
    if not isinstance(kept, Computed):
        return
    del module._modules[_CHILD]
    del module._parameters["weight"]
    if _PARTS in kept._modules:
        module.add_module(_PARTS, kept.get_submodule(_PARTS))
        module.__class__ = kept.cls
        return
    known = {**module._parameters, **kept._parameters}
    module._parameters.clear()
    module._parameters.update({name: known[name] for name in kept.stored})
    for key, hook in kept.hooks.items():
        module._forward_pre_hooks[key] = hook
        hook(module, None)


def make_plain_for_good(module: nn.Module) -> None:
    """Give ``module`` a plain weight and forget what it was computed from."""
    make_plain(module)
    forget_sources(module)
    hooks: dict[int, Any] = dict(module._load_state_dict_pre_hooks)
    for key, hook in hooks.items():
        if isinstance(hook.hook, SpectralNormLoadStateDictPreHook):  # it looks for what is gone
            del module._load_state_dict_pre_hooks[key]


def forget_sources(model: nn.Module) -> None:
    """Forget what plain weights were once computed from, in all of ``model``."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(_CHILD), Computed):
            del module._modules[_CHILD]
