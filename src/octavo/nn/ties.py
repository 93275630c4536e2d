"""Parameters that are one, and must be two for a while: their names, and the way back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_UNTIED = "octavo_untied"


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter -> all of its names."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in found.values()}


@torch.no_grad()
def untie(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Give these names parameters of their own.

    Returns:
        Each with the first name of what it was tied to, for ``tie_again``.
    """
    owners = {name: others[0] for others in names_of(model).values() for name in others}
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[last]
        assert old is not None
        module._parameters[last] = nn.Parameter(old.detach().clone(), old.requires_grad)
    return {name: owners[name] for name in names}


def remember_ties(model: nn.Module, ties: dict[str, str]) -> None:
    """Keep what ``untie`` returned with the model, until ``tie_again``."""
    vars(model)[_UNTIED] = ties


def ties_of(model: nn.Module) -> dict[str, str]:
    """What is remembered."""
    ties: dict[str, str] = vars(model).get(_UNTIED, {})
    return ties


def tie_again(model: nn.Module) -> None:
    """Let each remembered name be the parameter of its owner again."""
    for name, owner in vars(model).pop(_UNTIED, {}).items():
        path, _, last = name.rpartition(".")
        home, _, other = owner.rpartition(".")
        model.get_submodule(path)._parameters[last] = model.get_submodule(home)._parameters[other]
