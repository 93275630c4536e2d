"""Which parameters a forward pass multiplies with what, whatever the spelling, whether they are quantized or not.

A parameter is known by its memory, or by that of a copy made of it: ``stack[ids]``, or one in another dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from octavo.nn.products import Product, Role, product_of

_COPIES = (
    Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.to, Tensor.type, Tensor.float, Tensor.double,
    Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.clone,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Read:
    """One product of an activation with a parameter.

    Args:
        key: The parameter's name.
        axis: Of the parameter: the one that is summed over.
        x: ``(..., channels)`` the activation.
        time: What ``Reads.now`` said.
    """

    key: str
    axis: int
    x: Tensor
    time: int


class Reads(TorchFunctionMode):
    """While open, notes every product with one of some parameters.

    Args:
        parameters: By name; those that are not laid out in order in memory are not seen.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: list[Read] = []
        self.now = 0
        self._own = {
            p.untyped_storage().data_ptr(): (key, tuple(p.stride()), tuple(p.shape))
            for key, p in parameters.items()
            if p.is_contiguous() and p.numel() and not p.is_meta
        }
        self._copies: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = product_of(func, args)
        if product is not None and product.operation == "linear":
            self._look(product, args, kwargs)
        output = func(*args, **kwargs)
        if func in _COPIES and isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._follow(args[0], output)
        return output

    def _key_of(self, tensor: Tensor) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
        """Name, strides and shape of the parameter, or of the copy of it, in whose memory ``tensor`` lies."""
        if not tensor.numel() or tensor.is_meta or tensor.is_sparse:
            return None
        memory = tensor.untyped_storage().data_ptr()
        copy = self._copies.get(memory)
        if copy is None:
            return self._own.get(memory)
        made = copy[0]()
        return None if made is None else (copy[1], tuple(made.stride()), tuple(made.shape))

    def _follow(self, before: Tensor, after: Tensor) -> None:
        """A copy with the same axes: in another dtype, or of some matrices of a stack."""
        known, memory = self._key_of(before), after.untyped_storage().data_ptr() if not after.is_meta else 0
        if known is None or memory == before.untyped_storage().data_ptr() or not after.is_contiguous():
            return
        key, strides, shape = known
        if before.stride() == strides and after.ndim == len(shape) and tuple(after.shape[1:]) == shape[1:]:
            self._copies[memory] = (weakref.ref(after), key)

    def _look(self, product: Product, args: Any, kwargs: dict[str, Any]) -> None:
        left, right = product.left.of(args, kwargs), product.right.of(args, kwargs)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return
        roles = product.roles(tuple(left.shape), tuple(right.shape))
        for number, (weight, x) in enumerate(((left, right), (right, left))):
            known = self._key_of(weight)
            ins = [k for k, role in enumerate(roles[number]) if role is Role.IN]
            others = [k for k, role in enumerate(roles[1 - number]) if role is Role.IN]
            if known is None or not x.is_floating_point() or len(ins) != 1 or len(others) != 1:
                continue
            key, strides, shape = known
            (summed,) = ins
            axes = [a for a, step in enumerate(strides) if step == weight.stride(summed) and shape[a] > 1]
            if len(axes) == 1 and shape[axes[0]] == weight.shape[summed]:
                self.found.append(Read(key, axes[0], x.detach().movedim(others[0], -1), self.now))
                return
