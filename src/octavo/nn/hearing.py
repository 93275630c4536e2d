"""Hears what meets a weight in a functional call, expert by expert, whatever the spelling.

A weight is known by its memory: ``stack[k]``, a transposed view, the whole stack. ``stack[ids]`` is a copy, which is
known by its indices; ``grouped_mm`` says by its offsets which rows are whose.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from octavo.nn.block_layers import BlockLayer
from octavo.nn.products import Product, Role, product_of

_SELECTIONS = (Tensor.__getitem__, Tensor.index_select, torch.index_select)


class Hear(Protocol):
    """Told which rows a matrix meets; ``index`` is its number in a stack, -1 where there is no stack."""

    def __call__(self, layer: BlockLayer, index: int, x: Tensor, rows: Tensor) -> None:
        """``rows`` of ``x`` meet a matrix of ``layer``."""
        ...


class Hearing(TorchFunctionMode):
    """While open, tells of every product with one of some weights.

    Args:
        layers: Sites whose weight is listened for.
        hear: Who is told.
    """

    def __init__(self, layers: Iterable[BlockLayer], hear: Hear) -> None:
        super().__init__()
        self._hear = hear
        self._by_memory = {layer.parameter.untyped_storage().data_ptr(): layer for layer in layers}
        self._selected: dict[int, tuple[weakref.ref[Tensor], BlockLayer, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = product_of(func, args)
        if product is not None and product.operation == "linear":
            self._look(product, args, kwargs)
        output = func(*args, **kwargs)
        if func in _SELECTIONS and isinstance(output, Tensor):
            self._select(args, output)
        elif isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._follow(args[0], output)
        return output

    def _layer_of(self, tensor: Tensor) -> BlockLayer | None:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel() or tensor.is_meta:
            return None
        return self._by_memory.get(tensor.untyped_storage().data_ptr())

    def _select(self, args: Sequence[Any], output: Tensor) -> None:
        """``stack[ids]``."""
        layer = self._layer_of(args[0]) if args and isinstance(args[0], Tensor) else None
        ids = args[-1] if layer is not None else None
        if layer is not None and isinstance(ids, Tensor) and ids.ndim == 1 and not ids.is_floating_point():
            self._selected[id(output)] = (weakref.ref(output), layer, ids)

    def _selection(self, tensor: Tensor) -> tuple[BlockLayer, Tensor] | None:
        known = self._selected.get(id(tensor))
        return known[1:] if known is not None and known[0]() is tensor else None

    def _follow(self, before: Tensor, after: Tensor) -> None:
        """A transposed selection is one, too."""
        known = self._selection(before)
        if known is None or not after.ndim == before.ndim == 3 or after.shape[0] != before.shape[0]:
            return
        if after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
            self._selected[id(after)] = (weakref.ref(after), *known)

    def _look(self, product: Product, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        left, right = product.left.of(args, kwargs), product.right.of(args, kwargs)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return
        for weight, x, number in ((right, left, 0), (left, right, 1)):
            selection = self._selection(weight)
            layer = self._layer_of(weight) if selection is None else selection[0]
            if layer is None or not x.is_floating_point():
                continue
            roles = product.roles(tuple(left.shape), tuple(right.shape))[number]
            by_rows = _by_rows(x, roles, layer.quantizer.view.matrix_shape[-1])
            if by_rows is None:
                return
            if selection is not None:
                self._of_selection(layer, selection[1], x, by_rows)
            else:
                offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
                self._of_memory(layer, weight, x, by_rows, offsets if isinstance(offsets, Tensor) else None)
            return

    def _of_selection(self, layer: BlockLayer, ids: Tensor, x: Tensor, by_rows: Tensor) -> None:
        """Row ``k`` meets matrix ``ids[k]``."""
        if by_rows.ndim == 3 and by_rows.shape[0] == len(ids):
            for index in ids.unique().tolist():
                self._hear(layer, index, x, by_rows[ids == index].flatten(0, 1))

    def _of_memory(self, layer: BlockLayer, weight: Tensor, x: Tensor, by_rows: Tensor, offsets: Tensor | None) -> None:
        """A view of the parameter: all of it, or one matrix of a stack."""
        *stack, out_features, in_features = layer.quantizer.view.matrix_shape
        at = weight.storage_offset() - layer.parameter.storage_offset()
        index, inside = divmod(int(at), out_features * in_features)
        if inside or not layer.parameter.is_contiguous():
            return  # a later part of a matrix: its rows were heard with the first
        if not stack:
            self._hear(layer, -1, x, by_rows.flatten(0, -2))
        elif weight.ndim == 2:
            self._hear(layer, index, x, by_rows.flatten(0, -2))
        elif weight.shape[0] == stack[0] and len(stack) == 1:
            self._of_stack(layer, x, by_rows, offsets)

    def _of_stack(self, layer: BlockLayer, x: Tensor, by_rows: Tensor, offsets: Tensor | None) -> None:
        count = layer.quantizer.view.matrix_shape[0]
        if offsets is not None and offsets.shape == (count,) and by_rows.ndim == 2:
            start = 0
            for index, end in enumerate(offsets.tolist()):
                self._hear(layer, index, x, by_rows[start:end])
                start = end
        elif by_rows.ndim == 3 and by_rows.shape[0] == count:
            for index in range(count):
                self._hear(layer, index, x, by_rows[index])
        elif by_rows.ndim == 2:
            for index in range(count):
                self._hear(layer, index, x, by_rows)


def _by_rows(x: Tensor, roles: Sequence[Role], in_features: int) -> Tensor | None:
    """``(..stacks, rows, in_features)`` of an operand; ``None`` where it has no such view."""
    stacks, outs, ins = ([k for k, r in enumerate(roles) if r is role] for role in (Role.STACK, Role.OUT, Role.IN))
    if len(ins) != 1 or len(stacks) > 1 or x.shape[ins[0]] != in_features:
        return None
    moved = x.permute(*stacks, *outs, *ins)
    return moved.reshape(*(x.shape[k] for k in stacks), -1, in_features)
