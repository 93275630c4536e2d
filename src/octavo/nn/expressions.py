"""Expressions of a function: which one is running, and how it is changed into a call of a redirect.

``f(a)`` becomes ``redirect(owner, f, a)``; ``a @ b``, ``a + b`` and ``a.matmul(b)``, where a tensor stands in front,
become ``redirect(owner, matmul, a, b)``; ``super().f(a)`` becomes ``redirect(owner, f of the base class, self, a)``,
since ``torch.compile`` cannot look into what ``super()`` gives.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from types import CodeType
from typing import Any

import torch

Position = tuple[int, int, int, int]
"""Line, last line, column and end column (in bytes) of an expression, as code objects and ``ast`` give them."""

_OPERATORS: dict[type[ast.operator], tuple[str, Callable[..., Any]]] = {
    ast.MatMult: ("matmul", operator.matmul),
    ast.Add: ("add", operator.add),
}
_IN_PLACE: dict[type[ast.operator], tuple[str, Callable[..., Any]]] = {
    ast.MatMult: ("matmul", operator.matmul),
    ast.Add: ("iadd", operator.iadd),
}

Redirect = Callable[..., Any]
"""Called as ``redirect(owner, callee, *args, **kwargs)`` in place of ``callee(*args, **kwargs)``."""


@dataclass(frozen=True, slots=True)
class CallPoint:
    """One call expression (or ``a @ b``) inside a function.

    Args:
        code: The function's.
        position: Where in its source.
        method: The tensor method that it calls, for ``a.matmul(b)``; empty for any other call.
    """

    code: CodeType
    position: Position
    method: str = ""


def call_point(frame: Any) -> CallPoint:
    """The expression that ``frame`` is executing right now."""
    code = frame.f_code
    line, last, column, end = next(islice(code.co_positions(), frame.f_lasti // 2, None))
    return CallPoint(code, (line or 0, last or 0, column or 0, end or 0))


def _positions(node: ast.expr) -> set[Position]:
    """What code objects may give for ``node``: a method call over several lines begins at the method's name."""
    last, end = node.end_lineno or 0, node.end_col_offset or 0
    found = {(node.lineno, last, node.col_offset, end)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        line, column = node.func.end_lineno or 0, node.func.end_col_offset or 0
        found |= {(line, last, column - len(node.func.attr), stop) for stop in (end, column)}
    return found


class Redirector(ast.NodeTransformer):
    """Puts redirects into a function's tree.

    Args:
        owner: Name of the variable that is handed to the redirects.
        names: Position -> name under which the redirect is there at run time, and the tensor method called.
        first: Name of the function's first parameter.
        inherited: The function that ``super()`` finds by a name, ``None`` for none.
    """

    def __init__(
        self,
        owner: str,
        names: Mapping[Position, tuple[str, str]],
        first: str,
        inherited: Callable[[str], Any],
    ) -> None:
        self.owner = owner
        self.names = names
        self.first = first
        self.inherited = inherited
        self.found: set[Position] = set()
        self.needed: dict[str, Any] = {}

    def _at(self, node: ast.expr) -> Position | None:
        return next((p for p in _positions(node) if p in self.names and p not in self.found), None)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``f(a)`` and ``a.matmul(b)``."""
        position = self._at(node)
        if position is not None and self._is_reachable(node, self.names[position][1]):
            self.found.add(position)
        self.generic_visit(node)
        if position is None or position not in self.found:
            return node
        name, method = self.names[position]
        if method and isinstance(node.func, ast.Attribute) and not _is_class(node.func.value):
            callee: ast.expr = self._callee(method, getattr(torch.Tensor, method))
            return self._call(node, name, callee, [node.func.value, *node.args], node.keywords)
        base = self.inherited(node.func.attr) if isinstance(node.func, ast.Attribute) and _is_super(node.func) else None
        if base is not None and isinstance(node.func, ast.Attribute):
            args = [ast.Name(self.first, ast.Load()), *node.args]
            return self._call(node, name, self._callee(f"super_{node.func.attr}", base), args, node.keywords)
        return self._call(node, name, node.func, node.args, node.keywords)

    @staticmethod
    def _is_reachable(node: ast.Call, method: str) -> bool:
        """A tensor method that was bound to a name before the call hides its tensor."""
        return not method or (isinstance(node.func, ast.Attribute) and node.func.attr == method)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """``a @ b`` and ``a + b``."""
        position = self._at(node) if type(node.op) in _OPERATORS else None
        if position is not None:
            self.found.add(position)
        self.generic_visit(node)
        if position is None:
            return node
        callee = self._callee(*_OPERATORS[type(node.op)])
        return self._call(node, self.names[position][0], callee, [node.left, node.right], [])

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """``a @= b`` and ``a += b``: a plain name is assigned anew, as torch does it."""
        here = (node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0)
        self.generic_visit(node)
        known = _IN_PLACE.get(type(node.op))
        if here not in self.names or known is None or not isinstance(node.target, ast.Name):
            return node
        self.found.add(here)
        left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        callee = self._callee(*known)
        value = self._call(node, self.names[here][0], callee, [left, node.value], [])
        return ast.copy_location(ast.Assign([node.target], value), node)

    def _callee(self, name: str, function: Any) -> ast.Name:
        """A callee that the source does not spell out; ``needed`` collects them."""
        self.needed[f"octavo_callee_{name}__"] = function
        return ast.Name(f"octavo_callee_{name}__", ast.Load())

    def _call(
        self, node: ast.AST, name: str, callee: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> ast.Call:
        arguments: list[ast.expr] = [ast.Name(self.owner, ast.Load()), callee, *args]
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), arguments, keywords), node)


def _is_super(node: ast.Attribute) -> bool:
    call = node.value
    return isinstance(call, ast.Call) and not call.args and isinstance(call.func, ast.Name) and call.func.id == "super"


def _is_class(node: ast.expr) -> bool:
    """``Tensor`` or ``torch.Tensor``: a method that is called with the tensor as its first argument."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "Tensor"
