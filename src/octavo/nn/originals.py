"""The way back after steps that change weights: the original tensors where the user had them kept, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from octavo.errors import UserError

_KEPT = "octavo_kept"
_CHANGED = "octavo_changed_by"
_ADDED_BIAS = "octavo_added_bias"


@contextmanager
def watched(model: nn.Module, steps: tuple[str, ...], *, keep: bool) -> Iterator[None]:
    """Note what ``steps`` do to the tensors of ``model`` meanwhile, errors included.

    Args:
        model: Prepared or not; what matters is that its own tensors are still the original ones.
        steps: Names of the steps that run, for the message of ``require_way_back``.
        keep: Keep a copy of every tensor that may change.
    """
    if not steps:
        yield
        return
    tensors = dict(_tensors(model))
    before = {key: tensor._version for key, tensor in tensors.items()}
    if keep:
        vars(model)[_KEPT] = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    try:
        yield
    finally:
        changed = [key for key, tensor in _tensors(model) if before.get(key, tensor._version) != tensor._version]
        if changed:
            vars(model)[_CHANGED] = steps
        else:
            vars(model).pop(_KEPT, None)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the model itself; quantizers have their own names and are not among the kept."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def kept_bytes(model: nn.Module) -> int:
    """Bytes that ``keep`` costs."""
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def require_way_back(model: nn.Module) -> None:
    """Raise ``UserError`` when weights of ``model`` were changed and their originals were not kept."""
    for module in model.modules():
        if _CHANGED in vars(module) and _KEPT not in vars(module):
            steps = ", ".join(dict.fromkeys(vars(module)[_CHANGED]))
            raise UserError(
                f"the weights were changed by {steps}, and their originals were not kept: load the model again, or "
                "quantize with keep_original=True, which keeps a copy in memory"
            )


def give_bias(module: nn.Module, value: Tensor, like: nn.Parameter) -> None:
    """A bias for a layer without; ``give_back`` takes it away again."""
    module._parameters["bias"] = nn.Parameter(value.to(like.device, like.dtype), like.requires_grad)
    vars(module)[_ADDED_BIAS] = True


@torch.no_grad()
def give_back(model: nn.Module) -> None:
    """Write the kept originals into their tensors, and forget what happened."""
    for module in model.modules():
        if vars(module).pop(_ADDED_BIAS, False):
            module._parameters["bias"] = None
        kept = vars(module).pop(_KEPT, {})
        vars(module).pop(_CHANGED, None)
        for key, tensor in _tensors(module):
            if key in kept:
                tensor.copy_(kept[key])
