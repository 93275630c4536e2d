"""A graph run in pieces, so that what is looked at on the way is in memory for one piece only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from octavo.onnx.sessions import session_of

Arrays = dict[str, np.ndarray[Any, Any]]
Look = Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]
MOST_OBSERVED = 8
"""Tensors that one piece gives out to be looked at."""


@dataclass(frozen=True, slots=True)
class _Piece:
    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dropped: tuple[str, ...]  # nobody needs these afterwards


class Segments:
    """Consecutive pieces of a graph.

    Args:
        model: The graph.
        observed: Names of the tensors to look at.
        ends: Those behind which a piece ends at once, so that all who read them get what ``look`` gives.
    """

    def __init__(self, model: ir.Model, observed: Collection[str], *, ends: Collection[str] = ()) -> None:
        self.observed = frozenset(observed)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        nodes = list(model.graph)
        bounds = list(_cuts(nodes, self.observed, ends))
        self.pieces = list(self._cut(model, nodes, bounds))

    def _cut(self, model: ir.Model, nodes: list[ir.Node], bounds: list[int]) -> Iterator[_Piece]:
        starts = [0, *bounds[:-1]]
        needed = [reads(nodes[a:b]) for a, b in zip(starts, bounds, strict=True)]
        made: dict[str, int] = {str(value.name): -1 for value in model.graph.inputs}
        for index, (a, b) in enumerate(zip(starts, bounds, strict=True)):
            made |= {str(v.name): index for node in nodes[a:b] for v in node.outputs if v.name}
        last = {name: index for index, names in enumerate(needed) for name in names}
        last |= dict.fromkeys(self.outputs, len(bounds))
        for index in range(len(bounds)):
            inputs = tuple(name for name in needed[index] if made.get(name, index) < index)
            outputs = tuple(
                name
                for name, at in made.items()
                if at == index and (last.get(name, -1) > index or name in self.observed)
            )
            dropped = tuple(name for name in made if made[name] <= index and last.get(name, -1) <= index)
            piece = ir.convenience.extract(model.graph, list(inputs), list(outputs))
            part = ir.Model(piece, ir_version=model.ir_version, functions=list(model.functions.values()))
            yield _Piece(session_of(part), inputs, outputs, dropped)

    def run(self, inputs: Arrays, look: Look) -> Arrays:
        """One forward pass; ``look`` is told of every observed tensor once, and may give another value in its place."""
        live = dict(inputs)
        for name in self.observed & live.keys():
            look(name, live[name])
        for piece in self.pieces:
            fed = {value.name: live[value.name] for value in piece.session.get_inputs()}
            for name, value in zip(piece.outputs, piece.session.run(list(piece.outputs), fed), strict=True):
                seen = look(name, value) if name in self.observed else None
                live[name] = value if seen is None else seen
            for name in piece.dropped:
                if name not in self.outputs:
                    live.pop(name, None)
        return {name: live[name] for name in self.outputs}


def _cuts(nodes: list[ir.Node], observed: Collection[str], ends: Collection[str]) -> Iterator[int]:
    """Where a piece ends: as soon as enough is to be looked at, or behind what may be replaced."""
    count = 0
    for index, node in enumerate(nodes, 1):
        count += sum(value.name in observed for value in node.outputs)
        must = any(value.name in ends for value in node.outputs)
        if (count >= MOST_OBSERVED or must) and index < len(nodes):
            yield index
            count = 0
    yield len(nodes)


def reads(nodes: list[ir.Node]) -> list[str]:
    """Everything that nodes read, sub-graphs included, that is not an initializer."""
    names: dict[str, None] = {}
    for node in nodes:
        for value in _inputs(node):
            if value.name and not value.is_initializer():
                names[value.name] = None
    return list(names)


def _inputs(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []
        for graph in graphs:
            for inner in graph:
                yield from _inputs(inner)
