"""Batch norms folded into the layer before them, as every engine does it, before that layer is quantized.

A batch norm in evaluation mode multiplies and shifts channels by constants: ``W' = W * f`` and ``b' = (b - mean) * f +
beta`` with ``f = gamma / sqrt(var + eps)`` (Jacob et al., arXiv:1712.05877, section 3.2) give what the two gave. While
quantized the norm hands its input on. Its tensors are then those of a norm that does nothing but add ``b'``, so that
checkpoints are right for the model's own classes; a layer without a bias computes with that very tensor as its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octavo.nn.layers import is_sealed, layer_kind, original_class
from octavo.nn.parametrized import make_plain, sources_of, weight_of
from octavo.nn.trace import Trace
from octavo.nn.waiting import Waiting

_CHILD = "octavo_unfolded"
_SHARED_BIAS = "octavo_bias_of_norm"
_OPERATIONS = ("conv", "conv_transposed", "linear")
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FoldedNorm(nn.Module):
    """A norm that is part of the layer before it."""

    def forward(self, input: Tensor) -> Tensor:
        """What the layer gave."""
        return input


class Unfolded(Waiting):
    """The tensors that a layer or a norm had before they were folded."""


@dataclass(frozen=True, slots=True)
class Fold:
    """What becomes of a batch norm.

    Args:
        layer: Path of the layer that takes it in, empty for none.
        why_not: Why there is none.
    """

    layer: str = ""
    why_not: str = ""


def is_batch_norm(module: nn.Module) -> bool:
    """One of torch's, or a subclass of it."""
    return isinstance(module, _BatchNorm)


def find_folds(model: nn.Module, seen: Trace | None) -> dict[str, Fold]:
    """Path of every batch norm -> the layer that it can be folded into, by where its input comes from."""
    paths = {path: module for path, module in model.named_modules() if is_batch_norm(module)}
    if seen is None:
        return dict.fromkeys(paths, Fold(why_not="without a sample nobody knows what it follows"))
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    shared = frozenset(key for key, count in names.items() if count > 1)
    return {path: _fold(model, path, module, seen, shared) for path, module in paths.items()}


def _fold(model: nn.Module, path: str, norm: nn.Module, seen: Trace, shared: frozenset[int]) -> Fold:
    if seen.graph.is_blind:
        return Fold(why_not="the sample ran in inference mode, which hides what is changed in place")
    if original_class(norm).forward not in _FORWARDS:
        return Fold(why_not="it has a forward of its own")
    runs = [event for event in seen.graph.of(path) if event.func is F.batch_norm]
    if not runs:
        return Fold(why_not="the sample did not reach it")
    makers = [seen.graph.maker(event.reads[0]) for event in runs]
    layers = {maker.owner if maker is not None and maker.is_layer else "" for maker in makers}
    if len(layers) > 1 or "" in layers:
        return Fold(why_not="it does not follow one layer")
    layer = layers.pop()
    why = _obstacle(model.get_submodule(layer), norm, shared) or _obstacle_of_flow(model, layer, path, seen)
    return Fold(why_not=why) if why else Fold(layer)


def _obstacle(layer: nn.Module, norm: nn.Module, shared: frozenset[int]) -> str:
    """What forbids it, of the two modules."""
    kind = layer_kind(layer)
    if kind is None or kind.operation not in _OPERATIONS or not is_sealed(layer):
        return "it does not follow one layer"
    if norm._buffers.get("running_mean") is None:
        return "it has no running statistics"
    tensors = [*layer.parameters(), *norm.parameters()]
    if any(id(tensor) in shared for tensor in tensors):
        return "its parameters, or those of the layer before it, are shared"
    if layer._parameters.get("bias") is None and norm._parameters.get("bias") is None:
        return "neither it nor the layer before it has a bias"
    if layer._forward_hooks or norm._forward_pre_hooks or norm._forward_hooks:
        return "hooks look at what is between it and the layer before it"
    return ""


def _obstacle_of_flow(model: nn.Module, layer: str, path: str, seen: Trace) -> str:
    """What forbids it, of what the layer gives and who reads that."""
    weight = weight_of(model.get_submodule(layer))
    assert weight is not None
    for event in seen.graph.of(layer):
        readers = [reader for number in event.makes for reader in seen.graph.readers(number)]
        if any(reader.owner != path for reader in readers) or not readers:
            return "what the layer before it gives is read by something else, too"
        if event.ndim != weight.ndim:  # of a linear layer with more axes the channels are not on the second
            return "its channels are not those of the layer before it"
    return ""


def fold(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Fold batch norms into layers: path of a norm -> path of its layer."""
    for path, target in folds.items():
        norm, layer = model.get_submodule(path), model.get_submodule(target)
        if sources_of(layer):
            make_plain(layer)
        _fold_one(norm, layer)
        share_bias(norm, layer)


def fold_again(model: nn.Module, folds: Mapping[str, str]) -> None:
    """Let tensors that were stored while folded compute as they did then."""
    for path, target in folds.items():
        share_bias(model.get_submodule(path), model.get_submodule(target))


@torch.no_grad()
def _fold_one(norm: nn.Module, layer: nn.Module) -> None:
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean, variance = norm.running_mean.to(wide), norm.running_var.to(wide)
    gamma, beta = (None if p is None else p.to(wide) for p in (norm._parameters["weight"], norm._parameters["bias"]))
    deviation = torch.sqrt((variance + norm.eps).double()).to(wide)  # torch's fp32 root may be one place off
    factor = (torch.ones_like(mean) if gamma is None else gamma) / deviation
    shift = ((torch.zeros_like(mean) if bias is None else bias.to(wide)) - mean) * factor
    shift = shift if beta is None else shift + beta
    _wait(layer, ("weight", "bias"))
    _wait(norm, _TENSORS)
    layer._parameters["weight"] = _like(weight, weight.to(wide) * _along_outputs(layer, weight, factor))
    if bias is not None:
        layer._parameters["bias"] = _like(bias, shift)
    for name, value in (("weight", torch.ones_like(mean)), ("bias", shift if bias is None else torch.zeros_like(mean))):
        old = norm._parameters[name]
        norm._parameters[name] = None if old is None else _like(old, value)
    norm._buffers["running_mean"] = torch.zeros_like(norm.running_mean)
    norm._buffers["running_var"] = torch.full_like(norm.running_var, 1 - norm.eps)


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(old.dtype), old.requires_grad)


def _along_outputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """``factor``, one for each output, in a shape that multiplies ``weight``."""
    kind = layer_kind(layer)
    if kind is None or kind.operation != "conv_transposed":
        outputs_first = kind is None or not kind.is_transposed
        return factor.reshape(-1, *(1,) * (weight.ndim - 1)) if outputs_first else factor
    assert isinstance(layer, nn.modules.conv._ConvNd)  # (in, out / groups, ...): a group of inputs has its own outputs
    rows = factor.reshape(layer.groups, -1).repeat_interleave(weight.shape[0] // layer.groups, dim=0)
    return rows.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))


def share_bias(norm: nn.Module, layer: nn.Module) -> None:
    """A layer without a bias adds what the norm would have added."""
    if layer._parameters.get("bias") is None:
        layer._parameters["bias"] = norm._parameters["bias"]
        vars(layer)[_SHARED_BIAS] = True


def has_bias_of_norm(module: nn.Module) -> bool:
    """Whether the bias of a layer is stored as its norm's."""
    return _SHARED_BIAS in vars(module)


def _wait(module: nn.Module, names: Iterable[str]) -> None:
    kept = Unfolded()
    for name in names:
        if name in module._buffers:
            kept.register_buffer(name, module._buffers[name])
        elif name in module._parameters:
            kept.register_parameter(name, module._parameters[name])
    module.add_module(_CHILD, kept)


def unfold(module: nn.Module) -> None:
    """Give a layer or a norm the tensors that it had."""
    if vars(module).pop(_SHARED_BIAS, False):
        module._parameters["bias"] = None
    kept = module._modules.pop(_CHILD, None)
    if isinstance(kept, Unfolded):
        module._parameters.update(kept._parameters)
        module._buffers.update(kept._buffers)
