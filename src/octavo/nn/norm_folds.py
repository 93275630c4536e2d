"""The scales of a norm move into what reads its output, and its bias with them or under them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from octavo.nn.norms import NormKind
from octavo.nn.spaces import Member, Space

_TINY = 1e-3  # of a norm's scales: what a bias is divided by must not be smaller than this share of the largest


def _bias_key(model: nn.Module, member: Member) -> str:
    """The bias that is added to the product with a weight; empty where there is none."""
    home, _, last = member.key.rpartition(".")
    name = last.removesuffix("weight") + "bias"
    bias = model.get_submodule(home)._parameters.get(name) if last.endswith("weight") else None
    return f"{home}.{name}".lstrip(".") if bias is not None else ""


def bias_problem(model: nn.Module, kind: NormKind, path: str, made: Space) -> str:
    """Why the bias of a norm cannot go where its scales go; empty where it can."""
    norm = model.get_submodule(path)
    bias, weight = norm._parameters.get("bias"), norm._parameters.get("weight")
    if not kind.has_bias or bias is None or weight is None or not bool(bias.detach().any()):
        return ""
    if _readers_take_bias(model, made) or _divides(kind, weight):
        return ""
    return f"the bias of '{path}' cannot pass its scales, some of which are nearly zero, and what reads it has no bias"


def _readers_take_bias(model: nn.Module, made: Space) -> bool:
    own = dict(model.named_parameters())
    return all(_bias_key(model, m) and own[m.key].ndim == 2 for m in made.members)


def _divides(kind: NormKind, weight: Tensor) -> bool:
    scale = _scale(kind, weight).abs()
    return bool(scale.min() > _TINY * scale.max())


def _scale(kind: NormKind, weight: Tensor) -> Tensor:
    return weight.detach().float() + (1.0 if kind.is_centred else 0.0)


@torch.no_grad()
def fold_norm(model: nn.Module, path: str, kind: NormKind, made: Space) -> None:
    """Move the scales of a norm into the columns that read it, and its bias into their biases or under its scale."""
    norm, own = model.get_submodule(path), dict(model.named_parameters())
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None:
        return
    scale = _scale(kind, weight)
    if bias is not None and bool(bias.any()):
        if _readers_take_bias(model, made):
            for member in made.members:
                reader, target = own[member.key], own[_bias_key(model, member)]
                shift = torch.tensordot(reader.float(), bias.float(), dims=([member.axis], [0]))
                target.copy_(target.float() + shift)
            bias.zero_()
        else:
            bias.copy_(bias.float() / scale)
    for member in made.members:
        along_axis(own[member.key], member, lambda values: values * scale)
    weight.copy_(torch.full_like(weight, 0.0 if kind.is_centred else 1.0))


@torch.no_grad()
def along_axis(parameter: Tensor, member: Member, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a run of an axis by what ``change`` makes of it in fp32, that axis last."""
    part = parameter.detach().narrow(member.axis, member.start, member.size)
    part.copy_(change(part.movedim(member.axis, -1).float().contiguous()).movedim(-1, member.axis))
