"""Convolutions of a graph: how they move, the rows that meet their weights, and the layer whose channels they read."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from octavo.numerics.windows import Geometry, windows

_HOMOGENEOUS = frozenset(("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"))


def geometry_of(node: ir.Node, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> Geometry:
    """How ``node``, a Conv, moves over an input of these sizes."""
    attributes, axes = node.attributes, len(spatial)
    stride = tuple(attributes.get_ints("strides", [1] * axes))
    dilation = tuple(attributes.get_ints("dilations", [1] * axes))
    pads = attributes.get_ints("pads", [0] * 2 * axes)
    padding = tuple(zip(pads[:axes], pads[axes:], strict=True))
    automatic = attributes.get_string("auto_pad", "NOTSET")
    if automatic.startswith("SAME"):  # as many windows as strides; an odd row goes to the end that is named
        spans = [(size - 1) * spread + 1 for size, spread in zip(kernel, dilation, strict=True)]
        sizes = zip(spatial, stride, spans, strict=True)
        totals = [max((-(-size // step) - 1) * step + span - size, 0) for size, step, span in sizes]
        halves = [(total // 2, total - total // 2) for total in totals]
        padding = tuple(pair if automatic == "SAME_UPPER" else pair[::-1] for pair in halves)
    return Geometry(padding, stride, dilation, attributes.get_int("group", 1))


def rows_of(node: ir.Node, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """``(rows, in_channels * kernel)`` vectors of ``(batch, in_channels, *spatial)`` that meet an ungrouped weight."""
    seen = windows(x, kernel, geometry_of(node, tuple(x.shape[2:]), kernel))
    return seen.movedim(1, 1 + len(kernel)).flatten(0, len(kernel)).flatten(1)


def maker_of(value: ir.Value) -> ir.Node | None:
    """The layer whose channels ``value`` has, each perhaps through a function that a positive factor passes; nobody
    else reads what is between them.
    """
    node = value.producer()
    while node is not None and node.op_type in _HOMOGENEOUS:
        source = node.inputs[0]
        if source is None or len(source.uses()) != 1 or source.is_graph_output():
            return None
        node = source.producer()
    return node if node is not None and node.op_type in ("Conv", "Gemm") else None
