"""What a graph has that can be quantized: its sites, with stable names, operands and parameters."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from octavo.onnx.views import MatrixView
from octavo.spec.facts import ModelFacts, SiteFacts, Slot

_SCOPES = "pkg.torch.onnx.name_scopes"
_PARTS = ("weight", "bias", "gamma", "beta", "running_mean", "running_var", "scale", "kernel")
_NORMS = frozenset(
    (
        "LayerNormalization",
        "BatchNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
    )
)
BESIDE = "octavo.beside"
"""Metadata of a node that algorithms put beside a layer: it is part of no site."""
_LAYERS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
_INTEGER_LAYERS = frozenset(
    (
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
        "QGemm",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "QAttention",
    )
)
_BETWEEN = frozenset(("Mul", "Div", "Add", "Where", "Cast", "Softcap", "Identity", "Max", "Sub", "IsNaN"))
_SELECTING = frozenset(("Relu", "Clip", "MaxPool", "Identity"))
_GENERATED = re.compile(r"(onnx::|val_|_v_|const|initializer|\d+$)")


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor at a node: input ``index``, or its first output."""

    node: ir.Node
    index: int
    is_output: bool = False

    @property
    def value(self) -> ir.Value:
        """The tensor."""
        value = self.node.outputs[0] if self.is_output else self.node.inputs[self.index]
        assert value is not None
        return value


@dataclass(frozen=True, slots=True)
class GraphSite:
    """A site with the tensors that its quantizers sit on.

    Args:
        facts: As ``resolve`` sees it.
        operands: Slot -> tensor.
        view: How the weight becomes a matrix.
        product: The node whose multiply-adds count.
    """

    facts: SiteFacts
    operands: Mapping[Slot, Operand] = field(default_factory=dict)
    view: MatrixView | None = None
    product: ir.Node | None = None


def find_sites(model: ir.Model) -> list[GraphSite]:
    """Every site of ``model`` in the order of its nodes, then parameters that belong to none."""
    finder = _Finder(model.graph)
    for node in model.graph:
        finder.look_at(node)
    return finder.finish()


def facts_of(model: ir.Model, sites: Sequence[GraphSite], source: str, *, was_traced: bool) -> ModelFacts:
    """What ``resolve`` knows of a graph."""
    sizes = {value.name: value.const_value for value in _parameters(model.graph)}
    return ModelFacts(
        source,
        model.graph.name or "graph",
        tuple(site.facts for site in sites),
        sum(int(data.size) for data in sizes.values() if data is not None),
        sum(int(data.nbytes) for data in sizes.values() if data is not None),
        was_traced,
    )


class _Finder:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.sites: list[GraphSite] = []
        self.owners: dict[str, str] = {}  # initializer -> site
        self.names: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}  # tensor -> sites that read it
        self.makers: dict[ir.Node, str] = {}  # convolutions and residual sums -> their sites

    def look_at(self, node: ir.Node) -> None:
        if BESIDE in node.metadata_props:
            return
        if why := _quantized_already(node):
            self._add(node, "other", {}, obstacle=f"{why} quantized in the file already: kept as it is")
            return
        match node.op_type:
            case "MatMul" | "Gemm" if (weight := _weight(node, 1)) is not None:
                self._linear(node, weight)
            case "Conv" | "ConvTranspose" if (weight := _weight(node, 1)) is not None:
                self._convolution(node, weight)
            case "Gather" if (weight := _weight(node, 0)) is not None and _is_table(node, weight):
                view = MatrixView(tuple(weight.shape.numpy()))  # type: ignore[union-attr]
                self._add(
                    node,
                    "embedding",
                    {Slot.WEIGHT: Operand(node, 0), Slot.OUTPUT: Operand(node, 0, True)},
                    weight,
                    view,
                )
            case "MatMul" if (second := _second_product(node)) is not None:
                self._attention(node, second)
            case "Attention":
                slots = {Slot.QUERY: 0, Slot.KEY: 1, Slot.VALUE: 2}
                operands = {slot: Operand(node, index) for slot, index in slots.items()}
                self._add(node, "attention", operands | {Slot.ATTENTION_OUTPUT: Operand(node, 0, True)})
            case "Add" if len(sources := [self._source(value) for value in node.inputs]) == 2 and all(sources):
                self._sum(node, [name for name in sources if name])
            case kind if kind in _NORMS:
                self._add(node, "norm", {Slot.INPUT: Operand(node, 0), Slot.OUTPUT: Operand(node, 0, True)})

    def _linear(self, node: ir.Node, weight: ir.Value) -> None:
        shape = _shape(weight)
        is_rows = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", False))
        if len(shape) != 2:
            self._left(node, weight, f"a product with a weight of {len(shape)} axes")
        elif node.op_type == "Gemm" and node.attributes.get_int("transA", False):
            self._left(node, weight, "a Gemm that transposes its input")
        else:
            operands = {
                Slot.WEIGHT: Operand(node, 1),
                Slot.INPUT: Operand(node, 0),
                Slot.OUTPUT: Operand(node, 0, True),
            }
            self._add(node, "linear", operands, weight, MatrixView(shape, is_transposed=not is_rows))

    def _convolution(self, node: ir.Node, weight: ir.Value) -> None:
        is_transposed = node.op_type == "ConvTranspose"
        kind = "conv_transposed" if is_transposed else "conv"
        operands = _operands(node) | {Slot.OUTPUT: Operand(_activation(node), 0, True)}
        self._add(node, kind, operands, weight, MatrixView(_shape(weight), is_transposed))
        self.makers[node] = self.sites[-1].facts.name

    def _attention(self, first: ir.Node, second: ir.Node) -> None:
        operands = {
            Slot.QUERY: Operand(first, 0),
            Slot.KEY: Operand(first, 1),
            Slot.VALUE: Operand(second, 1),
            Slot.SOFTMAX: Operand(second, 0),
            Slot.ATTENTION_OUTPUT: Operand(second, 0, True),
        }
        self._add(first, "attention", operands)

    def _sum(self, node: ir.Node, sources: list[str]) -> None:
        """A residual sum: on its left what a convolution gives to nobody else, on its right what skipped that."""
        alone = [self._is_only_added(value) for value in node.inputs]
        first = 1 if alone == [False, True] else 0
        operands = {
            Slot.LEFT: Operand(node, first),
            Slot.RIGHT: Operand(node, 1 - first),
            Slot.OUTPUT: Operand(_activation(node), 0, True),
        }
        scope = _scope(node)
        number = sum(site.facts.operation == "add" and _scope(site.product) == scope for site in self.sites)
        name = f"{scope or '(model)'}#add{number}"
        adds = (sources[first], sources[1 - first])
        facts = SiteFacts(self._unique(name), "add", node.op_type, tuple(operands), adds=adds)
        self.makers[node] = facts.name
        self.sites.append(GraphSite(facts, operands, None, node))

    def _source(self, value: ir.Value | None) -> str:
        """The convolution or sum that gave ``value``, perhaps through what only selects values; empty for neither."""
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in _SELECTING:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        return self.makers.get(node, "") if node is not None else ""

    def _is_only_added(self, value: ir.Value | None) -> bool:
        """Whether a convolution gives ``value`` to one reader alone."""
        maker = value.producer() if value is not None else None
        return value is not None and maker is not None and maker.op_type == "Conv" and len(value.uses()) == 1

    def _left(self, node: ir.Node, weight: ir.Value, obstacle: str) -> None:
        self._add(node, "other", {}, weight, obstacle=obstacle)

    def _add(
        self,
        node: ir.Node,
        operation: str,
        operands: Mapping[Slot, Operand],
        weight: ir.Value | None = None,
        view: MatrixView | None = None,
        *,
        obstacle: str = "",
    ) -> None:
        name = self._unique(_site_name(node, weight))
        tied_to = self.owners.get(weight.name or "", "") if weight is not None else ""
        parameters = [] if weight is None or tied_to else [weight]
        parameters += [v for v in _own_parameters(node, weight) if v.name not in self.owners]
        self.owners |= dict.fromkeys((value.name or "" for value in parameters), name)
        facts = SiteFacts(
            name,
            operation,
            node.op_type,
            tuple(operands),
            weight_shape=view.matrix_shape if view is not None else (),
            parameters={value.name or "": int(value.const_value.size) for value in parameters if value.const_value},
            parameter_bytes=sum(value.const_value.nbytes for value in parameters if value.const_value),
            weight_name=weight.name or "" if weight is not None else "",
            tied_to=tied_to,
            obstacle=obstacle,
        )
        if Slot.INPUT in operands and operation != "norm":
            self.readers.setdefault(operands[Slot.INPUT].value.name or "", []).append(len(self.sites))
        self.sites.append(GraphSite(facts, operands, view, node))

    def _unique(self, name: str) -> str:
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        return name if not count else f"{name}#{count}"

    def finish(self) -> list[GraphSite]:
        """Sites with who shares their input, and a site for everything that has none."""
        for group in self.readers.values():
            names = [self.sites[index].facts.name for index in group]
            for index in group if len(group) > 1 else ():
                own = self.sites[index]
                others = tuple(name for name in names if name != own.facts.name)
                self.sites[index] = replace(own, facts=replace(own.facts, shares_input_with=others))
        rest: dict[str, list[ir.Value]] = {}
        for value in _parameters(self.graph):
            if value.name not in self.owners:
                rest.setdefault(_stem(value.name or ""), []).append(value)
        inside = {value.name for value in _inside_subgraphs(self.graph)}
        for stem, values in rest.items():
            obstacle = "inside a control-flow sub-graph: left alone" if any(v.name in inside for v in values) else ""
            known = {v.name or "": int(v.const_value.size) for v in values if v.const_value}
            size = sum(v.const_value.nbytes for v in values if v.const_value)
            name = self._unique(stem)
            self.sites.append(
                GraphSite(SiteFacts(name, "other", "", parameters=known, parameter_bytes=size, obstacle=obstacle))
            )
        return self.sites


def _quantized_already(node: ir.Node) -> str:
    """What of a layer's operands comes from somebody else's quantizers, or all of it; empty where nothing does."""
    if node.op_type in _INTEGER_LAYERS:
        return "its operands are"
    if node.op_type not in _LAYERS:
        return ""
    makers = [None if value is None else value.producer() for value in node.inputs[:2]]
    quantized = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
    match quantized:
        case [_, True]:
            return "its weight is"
        case [True, _]:
            return "its input is"
        case _:
            return ""


def _operands(node: ir.Node) -> dict[Slot, Operand]:
    """Of a layer with a weight: weight, input and output."""
    return {Slot.WEIGHT: Operand(node, 1), Slot.INPUT: Operand(node, 0), Slot.OUTPUT: Operand(node, 0, True)}


def _activation(node: ir.Node) -> ir.Node:
    """The ReLU or Clip that alone reads a convolution, so that engines fuse it; the convolution where there is none."""
    users = node.outputs[0].consumers()
    fused = len(users) == 1 and users[0].op_type in ("Relu", "Clip") and not node.outputs[0].is_graph_output()
    return users[0] if fused else node


def _weight(node: ir.Node, index: int) -> ir.Value | None:
    """The float initializer behind input ``index``, if that is what it is."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value if value.const_value.dtype.is_floating_point() else None


def _is_table(node: ir.Node, weight: ir.Value) -> bool:
    return len(_shape(weight)) == 2 and node.attributes.get_int("axis", 0) == 0 and min(_shape(weight)) > 1


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def whole(node: ir.Node) -> ir.Value:
    """What a layer gives, with the low-rank branch beside it where there is one."""
    value = node.outputs[0]
    users = value.consumers()
    has_branch = len(users) == 1 and users[0].op_type == "Add" and BESIDE in users[0].metadata_props
    return users[0].outputs[0] if has_branch else value


def _own_parameters(node: ir.Node, weight: ir.Value | None) -> Iterator[ir.Value]:
    """Other float parameters that a node reads, and the bias that the next one adds."""
    followers = [user for user in whole(node).consumers() if user.op_type == "Add"] if weight is not None else []
    for reader in (node, *followers):
        for index in range(len(reader.inputs)):
            value = _weight(reader, index)
            if (
                value is not None
                and value is not weight
                and value.const_value is not None
                and value.const_value.size > 1
            ):
                yield value


def _second_product(node: ir.Node) -> ir.Node | None:
    """The MatMul that reads the softmax of ``node``'s product; ``None`` where there is none."""
    if any(value is None or value.is_initializer() for value in node.inputs):
        return None
    value, found = node.outputs[0], False
    for _ in range(12):
        users = [user for user in value.consumers() if user.op_type != "IsNaN"]
        if len(users) != 1:
            return None
        user = users[0]
        if user.op_type == "MatMul":
            return user if found and user.inputs[0] is value else None
        if user.op_type != "Softmax" and user.op_type not in _BETWEEN:
            return None
        found = found or user.op_type == "Softmax"
        value = user.outputs[0]
    return None


def _site_name(node: ir.Node, weight: ir.Value | None) -> str:
    """The weight's module, else the module where the node was traced, else the node's own name."""
    if weight is not None and weight.name and not _GENERATED.match(weight.name) and "." in weight.name:
        return _stem(weight.name)
    own = (v for v in _own_parameters(node, weight) if len(v.uses()) == 1)  # exporters merge equal ones, as zeros are
    bias = next((v.name for v in own if v.name and "." in v.name), None)
    if weight is not None and bias and not _GENERATED.match(bias):
        return _stem(bias)
    if scope := _scope(node):
        return scope
    name = (node.name or node.outputs[0].name or node.op_type).strip("/").replace("/", ".")
    head, _, tail = name.rpartition(".")
    return head if head and tail.startswith(node.op_type) else name


def _scope(node: ir.Node | None) -> str:
    """The module where the exporter met ``node``; empty where it does not say."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")) if node is not None else []
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _stem(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return head if head and tail in _PARTS else name


def _parameters(graph: ir.Graph) -> Iterator[ir.Value]:
    """Float initializers of more than one value, those of sub-graphs included."""
    for one in (graph, *graph.subgraphs()):
        for value in one.initializers.values():
            data = value.const_value
            if data is not None and data.dtype.is_floating_point() and data.size > 1:
                yield value


def _inside_subgraphs(graph: ir.Graph) -> Iterator[ir.Value]:
    for sub in graph.subgraphs():
        if sub is not graph:
            yield from sub.initializers.values()
            for node in sub:
                yield from (value for value in node.inputs if value is not None and value.is_initializer())


def measured(site: GraphSite) -> list[Operand]:
    """The tensors whose shapes ``macs_of`` needs."""
    slots: dict[str, tuple[Slot, ...]] = {
        "linear": (Slot.INPUT,),
        "conv": (Slot.OUTPUT,),
        "conv_transposed": (Slot.INPUT,),
        "attention": (Slot.QUERY, Slot.KEY),
    }
    return [site.operands[slot] for slot in slots.get(site.facts.operation, ())]


def macs_of(site: GraphSite, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-adds of a site, from the shapes of what it reads and gives."""

    def shape(operand: Operand) -> tuple[int, ...] | None:
        return shapes.get(operand.value.name or "")

    match site.facts.operation:
        case "linear":
            given = shape(site.operands[Slot.INPUT])
            return None if given is None else math.prod(given) * site.facts.weight_shape[0]
        case "conv":
            out = shape(site.operands[Slot.OUTPUT])
            return None if out is None else math.prod(out) * site.facts.weight_shape[1]
        case "conv_transposed":
            given = shape(site.operands[Slot.INPUT])
            return None if given is None else math.prod(given) * site.facts.weight_shape[0]
        case "attention":
            query, key = shape(site.operands[Slot.QUERY]), shape(site.operands[Slot.KEY])
            if query is None or key is None or site.facts.type_name != "MatMul":
                return None
            return 2 * math.prod(query) * key[-1]
        case _:
            return 0
