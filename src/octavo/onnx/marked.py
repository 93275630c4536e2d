"""A graph with ``octavo.FakeQuantize`` where a plan has quantizers, and the graph that simulates it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from octavo.backends.simulate import format_key
from octavo.numerics.arrays import array_of
from octavo.numerics.qtensor import QTensor
from octavo.onnx.fake_quantize import ALSO, DOMAIN, NAME, QUANTIZER, operand
from octavo.onnx.graph import GraphSite, Operand
from octavo.onnx.lower import Style, lower
from octavo.onnx.storage import BASE_OPSET
from octavo.spec.facts import Slot
from octavo.spec.plan import Plan, QuantizerSpec
from octavo.spec.select import quantizer_name

Range = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Found:
    """What calibration found.

    Args:
        ranges: Quantizer name -> scale and zero point, of static activations.
        weights: Site name -> codes; or a value in the initializer's shape, from who checks files.
        off: Quantizers that stay off.
    """

    ranges: Mapping[str, Range]
    weights: Mapping[str, QTensor | Tensor]
    off: Collection[str] = ()


def marked(model: ir.Model, plan: Plan, sites: Mapping[str, GraphSite], found: Found) -> ir.Model:
    """A copy of ``model`` whose quantizers are nodes; weights are shared with it, not copied."""
    copy = _Copy(model)
    outputs_first = sorted(quantizers_of(plan, sites), key=lambda entry: entry[3] is not Slot.OUTPUT)
    for name, spec, site, slot in outputs_first:
        if name in found.off:
            continue
        if slot is Slot.WEIGHT:
            assert site.view is not None
            copy.mark_weight(name, spec, site)
        else:
            copy.mark(name, spec, site.operands[slot], found.ranges.get(name))
    copy.model.graph.sort()
    return copy.model


def simulated(model: ir.Model, plan: Plan, sites: Mapping[str, GraphSite], found: Found) -> ir.Model:
    """A copy of ``model`` that computes what the plan simulates: weights rounded, activations through Q/DQ."""
    activations = Found(
        found.ranges, {}, {*found.off, *(n for n, _, _, s in quantizers_of(plan, sites) if s is Slot.WEIGHT)}
    )
    copy = marked(model, plan, sites, activations)
    for name, _, site, slot in quantizers_of(plan, sites):
        if slot is Slot.WEIGHT and name not in found.off:
            value = copy.graph.initializers[site.facts.weight_name]
            array = array_of(rounded(site, found.weights[site.facts.name]))
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    lower(copy, Style(spells_relu=True), opset=BASE_OPSET)  # onnxruntime runs it
    return copy


def rounded(site: GraphSite, weight: QTensor | Tensor) -> Tensor:
    """What the simulation computes with, in the initializer's shape."""
    assert site.view is not None
    return site.view.to_parameter(weight.dequantize()) if isinstance(weight, QTensor) else weight


def quantizers_of(plan: Plan, sites: Mapping[str, GraphSite]) -> list[tuple[str, QuantizerSpec, GraphSite, Slot]]:
    """Every quantizer of a plan with where it sits."""
    return [
        (quantizer_name(decision.site.name, slot), spec, sites[decision.site.name], slot)
        for decision in plan.decisions
        for slot, spec in decision.scheme.items()
    ]


class _Copy:
    def __init__(self, model: ir.Model) -> None:
        self.model = _cloned(model)
        self.nodes = {node.name: node for node in self.model.graph}
        self._shared: dict[tuple[Any, ...], ir.Value] = {}

    def mark(self, name: str, spec: QuantizerSpec, at: Operand, known: Range | None) -> None:
        """A quantizer on one input or output of a node; the same one for all that read a tensor alike."""
        node = self.nodes[at.node.name]
        if at.is_output:
            value = node.outputs[0]
            users = list(value.uses())
            rounded = self._fake(name, spec, value, known)
            for user, index in users:
                user.replace_input_with(index, rounded)
            if value.is_graph_output():
                _give_out(self.model.graph, value, rounded)
            return
        source = node.inputs[at.index]
        assert source is not None
        if self._is_rounded(source, spec, known):
            _serve(source, name)
            return
        key = (source.name, spec.format, None if known is None else float(known[0]))
        if key in self._shared:
            _serve(self._shared[key], name)
        else:
            self._shared[key] = self._fake(name, spec, source, known)
        node.replace_input_with(at.index, self._shared[key])

    def _is_rounded(self, value: ir.Value, spec: QuantizerSpec, known: Range | None) -> bool:
        """Whether ``value`` comes from a quantizer that would leave nothing to do for this one."""
        maker = value.producer()
        if known is None or maker is None or maker.op_type != NAME or maker.domain != DOMAIN:
            return False
        same_format = maker.attributes["format"].as_string() == format_key(spec.format)
        given: list[Any] = [operand(maker, 1), operand(maker, 2)]
        wanted: list[Any] = [array_of(known[0].float()), None if known[1] is None else array_of(known[1].int())]
        return same_format and all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))

    def mark_weight(self, name: str, spec: QuantizerSpec, site: GraphSite) -> None:
        """A quantizer on an initializer, for all that read it."""
        assert site.view is not None
        graph = self.model.graph
        value = graph.initializers[site.facts.weight_name]
        users, shape = list(value.uses()), site.view.shape
        matrix = value
        if site.view.is_transposed:
            matrix = self._op("Transpose", matrix, perm=[1, 0, *range(2, len(shape))])
        if len(shape) > 2:
            matrix = self._op("Reshape", matrix, self._constant(f"{name}.matrix", np.asarray(site.view.matrix_shape)))
        back = self._fake(name, spec, matrix, None)
        if len(shape) > 2:
            swapped = (shape[1], shape[0], *shape[2:]) if site.view.is_transposed else shape
            back = self._op("Reshape", back, self._constant(f"{name}.shape", np.asarray(swapped)))
        if site.view.is_transposed:
            back = self._op("Transpose", back, perm=[1, 0, *range(2, len(shape))])
        for user, index in users:
            user.replace_input_with(index, back)

    def _fake(self, name: str, spec: QuantizerSpec, value: ir.Value, known: Range | None) -> ir.Value:
        inputs = [value]
        if known is not None:
            inputs.append(self._constant(f"{name}.scale", array_of(known[0].float())))
            if known[1] is not None:
                inputs.append(self._constant(f"{name}.zero_point", array_of(known[1].int())))
        node = ir.node(NAME, inputs, {"format": format_key(spec.format)}, domain=DOMAIN, name=f"{name}.fake_quantize")
        node.metadata_props[QUANTIZER] = name
        return self._put(node, value.type)

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        count = len(self.model.graph)
        return self._put(ir.node(op_type, list(inputs), attributes, name=f"octavo_{op_type}_{count}"), inputs[0].type)

    def _put(self, node: ir.Node, type_: Any) -> ir.Value:
        node.outputs[0].name = f"{node.name}_output"
        node.outputs[0].type = type_
        self.model.graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: Any) -> ir.Value:
        data = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
        self.model.graph.register_initializer(value)
        return value


def _serve(value: ir.Value, name: str) -> None:
    """Note at the quantizer that gives ``value`` that it stands for another, too."""
    maker = value.producer()
    assert maker is not None
    known = maker.metadata_props.get(ALSO)
    maker.metadata_props[ALSO] = name if known is None else f"{known}\n{name}"


def _cloned(model: ir.Model) -> ir.Model:
    graph = model.graph.clone()
    graph.opset_imports[DOMAIN] = 1
    return ir.Model(graph, ir_version=max(model.ir_version, 10), functions=list(model.functions.values()))


def _give_out(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """``new`` leaves the graph under the name that ``old`` had."""
    name = old.name
    old.name, new.name = f"{name}_unrounded", name
    new.shape = old.shape
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new
