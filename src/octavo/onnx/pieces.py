"""Consecutive pieces of a graph, each with a session of its own.

A piece ends in front of a norm, so that a norm and the layers that read it lie in one piece and a scale of their input
can be folded into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from octavo.numerics.arrays import tensor_of
from octavo.onnx.graph import GraphSite
from octavo.onnx.segments import reads
from octavo.onnx.sessions import session_of
from octavo.spec.facts import Slot

MOST_LAYERS = 6
"""Layers with a weight in one piece, before it ends at the next norm."""
NORM = "LayerNormalization"
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(slots=True)
class Piece:
    """Consecutive nodes.

    Args:
        name: For messages.
        nodes: In their order.
        inputs: Tensors from before.
        outputs: Tensors that something behind needs.
    """

    name: str
    nodes: list[ir.Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def pieces_of(model: ir.Model, sites: Iterable[GraphSite]) -> list[Piece]:
    """``model`` in pieces of some layers each."""
    products = {site.product.name for site in sites if site.product is not None and Slot.WEIGHT in site.operands}
    groups: list[list[ir.Node]] = [[]]
    count = 0
    for node in model.graph:
        if count >= MOST_LAYERS and node.op_type == NORM:
            groups.append([])
            count = 0
        groups[-1].append(node)
        count += node.name in products
    made = {str(value.name): -1 for value in model.graph.inputs}
    made |= {str(v.name): i for i, nodes in enumerate(groups) for node in nodes for v in node.outputs if v.name}
    needed = [reads(nodes) for nodes in groups]
    last = {name: index for index, names in enumerate(needed) for name in names}
    last |= dict.fromkeys((str(value.name) for value in model.graph.outputs), len(groups))
    found = []
    for index, nodes in enumerate(groups):
        live = [name for name, at in made.items() if at < index and last.get(name, -1) >= index]
        outputs = [name for name, at in made.items() if at <= index and last.get(name, -1) > index]
        found.append(Piece(f"piece {index + 1} of {len(groups)}", nodes, tuple(live), tuple(outputs)))
    return found


class PieceSession:
    """One piece of a model, ready to run as far as some tensors need it; what passes through untouched is passed on."""

    def __init__(self, model: ir.Model, piece: Piece, wanted: Sequence[str]) -> None:
        values = {str(value.name) for node in piece.nodes for value in node.outputs}
        self.wanted = list(dict.fromkeys(wanted))
        self.made = [name for name in self.wanted if name in values]
        self.session = None
        if self.made:
            graph = ir.convenience.extract(model.graph, list(piece.inputs), self.made)
            self.session = session_of(
                ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
            )

    def run(self, fed: Arrays) -> Arrays:
        """Everything wanted, by name."""
        found = dict(fed)
        if self.session is not None:
            given = {value.name: fed[value.name] for value in self.session.get_inputs()}
            found |= dict(zip(self.made, self.session.run(self.made, given), strict=True))
        return {name: found[name] for name in self.wanted}


def floats_of(arrays: Arrays) -> list[Tensor]:
    """The floating ones, as tensors."""
    return [tensor for tensor in map(tensor_of, arrays.values()) if tensor.is_floating_point()]
