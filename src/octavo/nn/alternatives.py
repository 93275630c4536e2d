"""Other calls of a function that take the same operands: branches that compute one product with another kernel.

Which branch runs may depend on the device, on shapes or on whether ``torch.compile`` is at work, so what holds for the
branch that was seen must hold for the others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace

from octavo.nn.expressions import CallPoint, Position
from octavo.nn.frames import Chain
from octavo.nn.rewrite import NoSourceError, definition

_NUM_OPERANDS = 2


def with_alternatives(chain: Chain) -> tuple[Chain, ...]:
    """``chain``, and the same way to every other call whose first two operands are written alike."""
    last = chain.points[-1]
    if last.method:
        return (chain,)
    return (chain, *(replace(chain, points=(*chain.points[:-1], point)) for point in _alternatives(last)))


def _alternatives(point: CallPoint) -> Iterator[CallPoint]:
    try:
        calls = [node for node in ast.walk(definition(point.code)) if isinstance(node, ast.Call)]
    except NoSourceError:
        return
    seen = next((node for node in calls if _position(node) == point.position), None)
    if seen is None or len(seen.args) < _NUM_OPERANDS:
        return
    for node in calls:
        if node is not seen and _operands(node) == _operands(seen):
            yield CallPoint(point.code, _position(node))


def _operands(node: ast.Call) -> list[str]:
    return [ast.dump(argument) for argument in node.args[:_NUM_OPERANDS]]


def _position(node: ast.expr) -> Position:
    return node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0
