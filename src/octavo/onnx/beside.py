"""What algorithms put beside a graph's layers: a rotation of what they read, and low-rank branches, as nodes.

The order is that of ``numerics.snapshot.LayerSnapshot``: pre_scale, rotation, and from there the quantizer and the
branch. The nodes are marked, so that who looks for layers passes over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.hadamard import hadamard
from octavo.numerics.snapshot import LayerSnapshot
from octavo.onnx.graph import BESIDE, GraphSite
from octavo.onnx.pre_scales import pre_scale_of
from octavo.spec.facts import Slot

_ROTATION, _BRANCH = "input_rotation", "low_rank"


def rotate_input(graph: ir.Graph, sites: Sequence[GraphSite], block_size: int) -> list[ir.Node]:
    """Rotate every ``block_size`` neighbours of what ``sites`` read, in front of them; nobody else's tensor changes.

    Args:
        graph: Theirs; nodes are in order.
        sites: Linear, of one tensor, in the order of the graph.
        block_size: Divides its channels.

    Returns:
        The nodes that are new.
    """
    first = sites[0].operands[Slot.INPUT]
    put = _Putter(graph, f"{sites[0].facts.name}.{_ROTATION}", first.node, first.value)
    width = sites[0].facts.weight_shape[1]
    matrix = put.constant("", hadamard(block_size).numpy() / math.sqrt(block_size), _dtype(sites[0]))
    value = first.value
    if block_size == width:
        value = put.node("MatMul", value, matrix)
    else:
        shape = put.node("Shape", value, dtype=ir.DataType.INT64)
        blocks = put.constant(".blocks", np.array([-1, width // block_size, block_size]), np.dtype(np.int64))
        value = put.node("Reshape", put.node("MatMul", put.node("Reshape", value, blocks), matrix), shape)
    value.shape = first.value.shape
    for operand in [site.operands[Slot.INPUT] for site in sites]:
        operand.node.replace_input_with(operand.index, value)
    put.made[-1].metadata_props[_ROTATION] = str(block_size)
    return put.made


def add_branch(graph: ir.Graph, site: GraphSite, a: Tensor, b: Tensor) -> list[ir.Node]:
    """Add ``x @ a.T @ b.T`` to what a linear site gives; ``x`` is what it reads, before rounding.

    Returns:
        The nodes that are new.
    """
    product = site.product
    assert product is not None
    output, users = product.outputs[0], list(product.outputs[0].uses())
    put = _Putter(graph, f"{site.facts.name}.{_BRANCH}", None, output, after=product)
    factors = [put.constant(f".{part}", array_of(factor.T), _dtype(site)) for part, factor in (("a", a), ("b", b))]
    narrow = put.node("MatMul", site.operands[Slot.INPUT].value, factors[0])
    total = put.node("Add", output, put.node("MatMul", narrow, factors[1]))
    total.shape = output.shape
    for user, index in users:
        user.replace_input_with(index, total)
    name = output.name  # others know the sum by the name that the product had
    output.name, total.name = f"{name}_unbranched", name
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = total
    put.made[-1].metadata_props[_BRANCH] = site.facts.name
    return put.made


def rotation_of(site: GraphSite) -> int:
    """Block size of the rotation of what a site reads, 0 for none."""
    maker = _maker(site)
    return int(maker.metadata_props.get(_ROTATION, 0)) if maker is not None else 0


def branch_of(site: GraphSite) -> tuple[ir.Value, ir.Value] | None:
    """The initializers ``a`` transposed and ``b`` transposed of a site's branch; ``None`` for none."""
    total = None if site.product is None else next(iter(site.product.outputs[0].consumers()), None)
    if total is None or total.metadata_props.get(_BRANCH) != site.facts.name:
        return None
    wide = total.inputs[1].producer()  # type: ignore[union-attr]
    assert wide is not None
    narrow = wide.inputs[0].producer()  # type: ignore[union-attr]
    assert narrow is not None
    assert narrow.inputs[1] is not None
    assert wide.inputs[1] is not None
    return narrow.inputs[1], wide.inputs[1]


def initializers_of(site: GraphSite) -> set[str]:
    """Names of what lies beside a site; the layers' snapshots have the values."""
    maker = _maker(site)
    found = [pre_scale_of(site), *(branch_of(site) or ())]
    if rotation_of(site) and maker is not None:
        found += [value for node in (maker, *_before(maker)) for value in node.inputs if _is_float(value)]
    return {str(value.name) for value in found if value is not None}


def tensors_of(layers: Sequence[LayerSnapshot]) -> Mapping[str, Tensor]:
    """Initializer -> value of what lies beside layers; of those that share a tensor the first one's name counts."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer.pre_scale is not None:
            found[f"{layer.name}.pre_scale"] = layer.pre_scale
        if layer.input_rotation:
            size = layer.input_rotation
            found[f"{layer.name}.{_ROTATION}"] = hadamard(size) / math.sqrt(size)
        for part, factor in zip("ab", layer.low_rank or (), strict=False):
            found[f"{layer.name}.{_BRANCH}.{part}"] = factor.T
    return found


def extras_of(layer: LayerSnapshot) -> Iterator[tuple[str, Tensor]]:
    """As ``Door.simulated_extras`` names them."""
    if layer.pre_scale is not None:
        yield f"{layer.name}.pre_scale", layer.pre_scale
    if layer.input_rotation:
        yield f"{layer.name}.{_ROTATION}", torch.tensor(layer.input_rotation)
    for part, factor in zip("ab", layer.low_rank or (), strict=False):
        yield f"{layer.name}.{_BRANCH}.{part}", factor


def factors_of(site: GraphSite) -> tuple[Tensor, Tensor] | None:
    """``a`` and ``b`` of a site's branch, as ``add_branch`` takes them."""
    found = branch_of(site)
    if found is None:
        return None
    a, b = (tensor_of(value.const_value.numpy()).T.contiguous() for value in found if value.const_value is not None)
    return a, b


def _maker(site: GraphSite) -> ir.Node | None:
    return site.operands[Slot.INPUT].value.producer() if Slot.INPUT in site.operands else None


def _before(node: ir.Node) -> Iterator[ir.Node]:
    """The marked nodes that a marked one reads."""
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if maker is not None and BESIDE in maker.metadata_props:
            yield maker
            yield from _before(maker)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype is not ir.DataType.INT64


def _dtype(site: GraphSite) -> np.dtype[Any]:
    weight = site.operands[Slot.WEIGHT].value
    assert weight.const_value is not None
    return weight.const_value.numpy().dtype


class _Putter:
    """Puts marked nodes in front of one, or behind one."""

    def __init__(
        self, graph: ir.Graph, name: str, before: ir.Node | None, like: ir.Value, *, after: ir.Node | None = None
    ) -> None:
        self.graph, self.name, self.like = graph, name, like
        self.made: list[ir.Node] = []
        self._before, self._after = before, after

    def constant(self, part: str, array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> ir.Value:
        data = ir.Tensor(np.ascontiguousarray(array).astype(dtype), name=f"{self.name}{part}")
        value = ir.Value(name=data.name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(value)
        return value

    def node(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        node = ir.node(op_type, list(inputs), name=f"{self.name}.{op_type}_{len(self.made)}")
        node.metadata_props[BESIDE] = self.name
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].type = self.like.type if dtype is None else ir.TensorType(dtype)
        if self._before is not None:
            self.graph.insert_before(self._before, node)
        else:
            assert self._after is not None
            self.graph.insert_after(self.made[-1] if self.made else self._after, node)
        self.made.append(node)
        return node.outputs[0]
