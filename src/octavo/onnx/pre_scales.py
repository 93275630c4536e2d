"""Scales of layers' inputs that no norm takes in: one Div in front of the layers that read a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from octavo.numerics.arrays import array_of
from octavo.onnx.graph import BESIDE, GraphSite
from octavo.spec.facts import Slot

_MARK = "octavo.pre_scale"


def divide_input(graph: ir.Graph, sites: Sequence[GraphSite], scale: Tensor) -> ir.Node:
    """Put a Div in front of ``sites``, which are linear and read one tensor; nobody else's tensor changes.

    Args:
        graph: Theirs; nodes are in order.
        sites: In the order of the graph.
        scale: ``(in_features,)``.
    """
    source = sites[0].operands[Slot.INPUT].value
    weight = sites[0].operands[Slot.WEIGHT].value
    assert weight.const_value is not None
    name = f"{sites[0].facts.name}.pre_scale"
    data = ir.Tensor(np.ascontiguousarray(array_of(scale)).astype(weight.const_value.numpy().dtype), name=name)
    divisor = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
    graph.register_initializer(divisor)
    node = ir.node("Div", [source, divisor], name=f"{name}.Div")
    node.metadata_props[_MARK] = name
    node.outputs[0].name = f"{name}_output"
    node.outputs[0].shape, node.outputs[0].type = source.shape, source.type
    graph.insert_before(sites[0].operands[Slot.INPUT].node, node)
    for site in sites:
        operand = site.operands[Slot.INPUT]
        operand.node.replace_input_with(operand.index, node.outputs[0])
    return node


def pre_scale_of(site: GraphSite) -> ir.Value | None:
    """The initializer that divides a site's input; ``None`` where ``divide_input`` put nothing."""
    maker = site.operands[Slot.INPUT].value.producer() if Slot.INPUT in site.operands else None
    while maker is not None and BESIDE in maker.metadata_props:  # a rotation comes behind it
        maker = None if maker.inputs[0] is None else maker.inputs[0].producer()
    return maker.inputs[1] if maker is not None and _MARK in maker.metadata_props else None
