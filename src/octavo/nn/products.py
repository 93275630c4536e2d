"""Torch functions in which two tensors meet: which operands, along which axes, with how many multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Role(Enum):
    """What one axis of a product's operand is to its result."""

    STACK = "stack"  # one product for each of its indices
    OUT = "out"  # an axis of the result
    IN = "in"  # summed over


Roles = tuple[Role, ...]
_STACK, _OUT, _IN = Role.STACK, Role.OUT, Role.IN


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a call has one of its operands.

    Args:
        index: Among the positional arguments; -1 is the result, -2 a value that the call computes inside.
        name: As a keyword.
        item: Index in the list that this argument is, -1 where it is the tensor itself.
    """

    index: int
    name: str = ""
    item: int = -1

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The operand itself, ``None`` where the call has none."""
        value = args[self.index] if len(args) > self.index else kwargs.get(self.name)
        return value if self.item < 0 or value is None else value[self.item]


RESULT = Operand(-1)
INSIDE = -2


@dataclass(frozen=True, slots=True)
class Product:
    """One torch function that multiplies.

    Args:
        operation: As in ``SiteFacts``, where one of the operands is a weight.
        left, right: Its operands.
        roles: Of the axes of both operands, for their shapes.
        bias: Where a bias may be.
        is_dense: False: the left operand holds indices and is not multiplied.
    """

    operation: str
    left: Operand
    right: Operand
    roles: Callable[[tuple[int, ...], tuple[int, ...]], tuple[Roles, Roles]]
    bias: Operand | None = None
    is_dense: bool = True

    def macs(self, left: Tensor, right: Tensor, output: Tensor) -> int:
        """Multiply-adds of one call."""
        if not self.is_dense:
            return 0
        if self.operation == "conv_transposed":  # every input value meets every weight of its channel
            return left.numel() * (right.numel() // right.shape[0])
        shape, roles = tuple(right.shape), self.roles(tuple(left.shape), tuple(right.shape))[1]
        return output.numel() * math.prod(n for n, role in zip(shape, roles, strict=True) if role is _IN)


def _linear_roles(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    return (_OUT,) * (len(left) - 1) + (_IN,), (_OUT,) * (len(right) - 1) + (_IN,)


def _matmul_roles(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    rows = (_STACK,) * (len(left) - 2) + ((_OUT, _IN) if len(left) > 1 else (_IN,))
    columns = (_STACK,) * (len(right) - 2) + ((_IN, _OUT) if len(right) > 1 else (_IN,))
    return rows, columns


def _conv_roles(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    return (_STACK,) + (_IN,) * (len(left) - 1), (_OUT,) + (_IN,) * (len(right) - 1)


def _transposed_roles(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    return (_STACK,) + (_IN,) * (len(left) - 1), (_IN, _OUT) + (_OUT,) * (len(right) - 2)


def _table_roles(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    return (_OUT,) * len(left), (_OUT,) + (_IN,) * (len(right) - 1)


def _einsum_roles(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Roles, Roles]:
    inputs, _, result = equation.replace(" ", "").partition("->")
    first, second = (
        _spelled(letters, len(shape)) for letters, shape in zip(inputs.split(","), (left, right), strict=True)
    )
    if "->" not in equation:
        both = first + second
        result = "".join(sorted(c for c in set(both) if both.count(c) == 1 or not c.isalpha()))
    kept = set(_spelled(result, len(result) + 20)) if "." in result else set(result)

    def roles(own: str, other: str) -> Roles:
        return tuple(_IN if c not in kept else _STACK if c in other else _OUT for c in own)

    return roles(first, second), roles(second, first)


def _spelled(letters: str, num_axes: int) -> str:
    """``letters`` with a digit-like character for each axis of an ellipsis, counted from its end."""
    if "..." not in letters:
        return letters
    rest = letters.replace("...", "")
    extra = "".join(chr(0x2460 + k) for k in reversed(range(num_axes - len(rest))))
    return letters.replace("...", extra)


_MATMUL = Product("linear", Operand(0, "input"), Operand(1, "other"), _matmul_roles)
_MM = Product("linear", Operand(0, "input"), Operand(1, "mat2"), _matmul_roles)
_ADDMM = Product("linear", Operand(1, "mat1"), Operand(2, "mat2"), _matmul_roles, bias=Operand(0, "input"))
_ADDBMM = Product("linear", Operand(1, "batch1"), Operand(2, "batch2"), _matmul_roles, bias=Operand(0, "input"))
_ADDMV = Product("linear", Operand(1, "mat"), Operand(2, "vec"), _matmul_roles, bias=Operand(0, "input"))
_GROUPED = Product("linear", Operand(0, "mat_a"), Operand(1, "mat_b"), _matmul_roles)
_LINEAR = Product("linear", Operand(0, "input"), Operand(1, "weight"), _linear_roles, bias=Operand(2, "bias"))
_CONV = Product("conv", Operand(0, "input"), Operand(1, "weight"), _conv_roles, bias=Operand(2, "bias"))
_CONV_TRANSPOSED = replace(_CONV, operation="conv_transposed", roles=_transposed_roles)
_TABLE = Product("embedding", Operand(0, "input"), Operand(1, "weight"), _table_roles, is_dense=False)

_PRODUCTS: dict[Any, Product] = {
    F.linear: _LINEAR,
    F.embedding: _TABLE,
    F.embedding_bag: _TABLE,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONV_TRANSPOSED),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul), _MATMUL),
    **dict.fromkeys((torch.mm, torch.bmm, torch.mv, Tensor.mm, Tensor.bmm, Tensor.mv), _MM),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _ADDMM),
    **dict.fromkeys((torch.baddbmm, torch.addbmm, Tensor.baddbmm, Tensor.addbmm), _ADDBMM),
    **dict.fromkeys((torch.addmv, Tensor.addmv), _ADDMV),
    **dict.fromkeys((getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)), _GROUPED),
}
_PRODUCTS.pop(None, None)
_BY_NAME = {"transformers.grouped_mm_fallback": _GROUPED}
"""Custom operators, which exist only once their library was imported."""

SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


def projection_inside(name: str) -> Product:
    """A projection that a function computes inside: of an input that is called ``name`` there."""
    return replace(_LINEAR, left=Operand(INSIDE, name), bias=None)


def product_of(func: Any, args: Sequence[Any]) -> Product | None:
    """What ``func`` multiplies, ``None`` when it is no product of two tensors."""
    if func is torch.einsum:
        return _einsum(args)
    try:
        found = _PRODUCTS.get(func)
    except TypeError:  # not hashable
        return None
    if found is None and isinstance(func, torch._ops.OpOverloadPacket):
        return _BY_NAME.get(str(func))
    return found


def _einsum(args: Sequence[Any]) -> Product | None:
    equation, *operands = args
    is_list = len(operands) == 1 and isinstance(operands[0], list | tuple)
    if not isinstance(equation, str) or len(operands[0] if is_list else operands) != 2:
        return None
    left, right = (Operand(1, "", k) if is_list else Operand(1 + k) for k in (0, 1))
    return Product("linear", left, right, lambda a, b: _einsum_roles(equation, a, b))
