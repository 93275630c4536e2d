"""Where the tensors of a traced forward come from: from parameters, from a product, from a softmax of one.

Tensors are known by identity and held weakly, so nothing lives longer than in a plain forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Axes = tuple[int | None, ...]
"""For every axis of a tensor the parameter's axis that it runs along, ``None`` where there is no single one."""


@dataclass(frozen=True, slots=True)
class Source:
    """A parameter, or what views, casts and selections made of it.

    Args:
        key: The parameter's first name.
        axes: Which of its axes these are.
        in_order: The tensor holds all of the parameter's values in their order (only its shape may differ).
    """

    key: str
    axes: Axes
    in_order: bool = True


@dataclass(frozen=True, slots=True)
class Computed:
    """Made of parameters and constants alone, by more than views: ``weight * scale``."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A buffer, or made during the forward of no tensor at all."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Made of the model's inputs.

    Args:
        scores: Products of two activations that it was computed from without another product between.
        is_softmax: A softmax was taken on the way.
    """

    scores: tuple[Any, ...] = ()
    is_softmax: bool = False


Origin = Source | Computed | Constant | Activation
_PLAIN = Activation()
_CONSTANT = Constant()

_COPIES = frozenset(
    {
        Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as,
        Tensor.contiguous, Tensor.clone, Tensor.detach, Tensor.cpu, Tensor.cuda, torch.clone,
    }
)  # fmt: skip
_SELECTIONS = frozenset({Tensor.__getitem__, Tensor.index_select, torch.index_select})


class Ledger:
    """What is known of every tensor that is alive."""

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._ranges: dict[int, tuple[str, int]] = {}
        for key, parameter in model.named_parameters():
            self.note(parameter, Source(key, tuple(range(parameter.ndim))))
            if type(parameter.data) is Tensor and parameter.numel():
                self._ranges[parameter.untyped_storage().data_ptr()] = (key, parameter.numel())
        for buffer in model.buffers():
            self.note(buffer, _CONSTANT)

    def note(self, tensor: Tensor, origin: Origin) -> None:
        """Remember where ``tensor`` comes from."""
        self._known[id(tensor)] = (weakref.ref(tensor), origin)

    def origin(self, tensor: Tensor) -> Origin:
        """Where ``tensor`` comes from; what is not known came in from outside."""
        known = self._known.get(id(tensor))
        return _PLAIN if known is None or known[0]() is not tensor else known[1]

    def hidden_view(self, tensor: Tensor) -> str:
        """The parameter whose memory ``tensor`` shares although it was not made of it during this forward."""
        if type(tensor) is not Tensor or not tensor.numel() or tensor.is_meta:
            return ""
        found = self._ranges.get(tensor.untyped_storage().data_ptr())
        return found[0] if found is not None else ""

    def follow(self, func: Any, inputs: list[Tensor], output: Any) -> None:
        """Note where the results of ``func``, which is no product, come from."""
        results = list(_results(output))
        if not results:
            return
        origins = [self.origin(tensor) for tensor in inputs]
        source = origins[0] if origins else None
        if isinstance(source, Source) and (len(origins) == 1 or func in _SELECTIONS):
            for result in results:
                self.note(result, _derived(source, func, inputs, result))
            return
        origin = merged(origins)
        if origin is not _PLAIN:
            for result in results:
                self.note(result, origin)
        else:  # an operation in place may have left an older origin
            for result in results:
                self._known.pop(id(result), None)


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            yield from (item for item in value if isinstance(item, Tensor))


def _results(output: Any) -> Iterator[Tensor]:
    return tensors_of((output,))


def merged(origins: list[Origin]) -> Origin:
    """Where a value computed of several comes from."""
    activations = [origin for origin in origins if isinstance(origin, Activation)]
    if activations:
        scores = tuple(dict.fromkeys(product for origin in activations for product in origin.scores))
        return Activation(scores, any(origin.is_softmax for origin in activations)) if scores else _PLAIN
    keys = tuple(dict.fromkeys(key for origin in origins for key in parameters_of(origin)))
    return Computed(keys) if keys else _CONSTANT


def parameters_of(origin: Origin) -> tuple[str, ...]:
    """The parameters that a value is made of, where it is made of nothing else but constants."""
    match origin:
        case Source():
            return (origin.key,)
        case Computed():
            return origin.keys
        case _:
            return ()


def _derived(source: Source, func: Any, inputs: list[Tensor], after: Tensor) -> Origin:
    """What a function of one parameter-made tensor (and perhaps of indices into it) gives."""
    before, shape = inputs[0], tuple(after.shape)
    if after is before:
        return source
    if len(inputs) > 1:
        return _selected(source, inputs, after)
    if func in _COPIES and shape == tuple(before.shape):
        return source
    if after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
        whole = source.in_order and after.numel() == before.numel() and after.is_contiguous()
        return Source(source.key, _axes_of_view(source.axes, before, after), whole)
    if after.numel() == before.numel() and func in (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten):
        return replace(source, axes=(None,) * after.ndim, in_order=source.in_order)
    return Computed((source.key,))


def _selected(source: Source, inputs: list[Tensor], after: Tensor) -> Origin:
    """``weight[ids]``: some of a stack of weights, copied."""
    if len(inputs) > 2 or inputs[1].is_floating_point():
        return Computed((source.key,))
    rest = source.axes[1:]
    return Source(source.key, (None,) * (after.ndim - len(rest)) + rest, in_order=False)


def _axes_of_view(axes: Axes, before: Tensor, after: Tensor) -> Axes:
    """Axes of a view by the steps in memory that they take; an axis of one element is nobody's."""
    known = {
        (stride, size): axis
        for stride, size, axis in zip(before.stride(), before.shape, axes, strict=True)
        if size > 1 and axis is not None
    }
    found: list[int | None] = []
    for stride, size in zip(after.stride(), after.shape, strict=True):
        fits = [axis for (step, length), axis in known.items() if step == stride and size <= length]
        found.append(fits[0] if size > 1 and len(fits) == 1 else None)
    return tuple(found)
