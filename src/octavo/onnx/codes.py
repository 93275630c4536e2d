"""Every QuantizeLinear of a graph, fed what a reader fed it, held against octavo's codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

import onnx
from octavo.errors import UserError
from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.qtensor import quantize
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.onnx.fake_quantize import QUANTIZER
from octavo.onnx.fp4_blocks import is_fp4_blocks
from octavo.onnx.queries import FACTOR
from octavo.onnx.runners import open_runner
from octavo.onnx.stages import Stage
from octavo.onnx.storage import BASE_OPSET
from octavo.spec.element import IntFormat
from octavo.spec.facts import QUANTIZER_NAMES

MOST_CODES_OFF = 0.001
IR_VERSION = 10
_NARROW = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class NodeAgreement:
    """One QuantizeLinear, fed what the runtime fed it.

    Args:
        quantizer: Its full name.
        num_values: How many codes were compared.
        share_equal: Share of them that equal octavo's.
        worst: Largest distance, in codes.
    """

    quantizer: str
    num_values: int
    share_equal: float
    worst: int

    @property
    def agrees(self) -> bool:
        """At least 99.9 % equal, and none off by more than one code."""
        return self.share_equal >= 1 - MOST_CODES_OFF and self.worst <= 1


@dataclass(frozen=True, slots=True)
class _Quantize:
    """One QuantizeLinear: the values that it reads and writes, the type of its scale, what it reads of the real input.

    In a narrow type it is evaluated alone: onnxruntime computes fp16 in fp32 and feeds it what it never rounded.
    """

    source: str
    codes: str
    dtype: torch.dtype
    factor: float
    alone: ReferenceEvaluator | None

    @classmethod
    def of(cls, node: ir.Node) -> _Quantize:
        x, scale = node.inputs[0], node.inputs[1]
        assert x is not None
        assert scale is not None
        assert scale.dtype is not None
        factor = float(node.metadata_props.get(FACTOR, 1.0))
        alone = ReferenceEvaluator(_alone(node)) if scale.dtype in _NARROW else None
        kind = x.dtype if is_fp4_blocks(node) else scale.dtype
        dtype = torch.float32 if kind is None else _NARROW.get(kind, torch.float32)
        return cls(str(x.name), str(node.outputs[0].name), dtype, factor, alone)

    def codes_in(self, found: Mapping[str, Array]) -> Array:
        """Its codes among the values of a run."""
        if self.alone is None:
            return found[self.codes]
        results: Any = self.alone.run(None, {"x": array_of(tensor_of(found[self.source]).to(self.dtype))})
        return np.asarray(results[0])


def _alone(node: ir.Node) -> onnx.ModelProto:
    """A model of one node whose first input is ``x``."""
    version = node.graph.opset_imports.get("", BASE_OPSET) if isinstance(node.graph, ir.Graph) else BASE_OPSET
    first, *others = node.inputs
    assert first is not None
    x = ir.Value(name="x", shape=first.shape, type=first.type)
    copies = [
        None
        if value is None
        else ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        for value in others
    ]
    twin = ir.node(node.op_type, [x, *copies], dict(node.attributes))
    graph = ir.Graph([x], twin.outputs, nodes=[twin], opset_imports={"": version}, name="one")
    for value in copies:
        if value is not None:
            graph.register_initializer(value)
    twin.outputs[0].name, twin.outputs[0].type = "y", node.outputs[0].type
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))


def compare_codes(path: Path, fed: list[Stage], layers: Mapping[str, LayerSnapshot]) -> tuple[NodeAgreement, ...]:
    """Run the graph ``path`` node by node, and quantize what each QuantizeLinear was fed.

    Raises:
        UserError: it has a quantizer that ``layers`` have not, or nobody can run it.
    """
    graph = ir.load(path).graph
    own = [str(value.name) for value in graph.outputs]
    nodes = {node.metadata_props[QUANTIZER]: _Quantize.of(node) for node in graph if QUANTIZER in node.metadata_props}
    given = {str(value.name) for value in graph.inputs}
    if not nodes:
        return ()
    wanted = dict.fromkeys(name for node in nodes.values() for name in (node.source, node.codes))
    inside = [name for name in wanted if name not in own and name not in given]
    runner = open_runner(path, inside, optimized=False)
    tallies: dict[str, list[tuple[int, int, int]]] = {name: [] for name in nodes}
    for stage in fed:
        found = stage.arrays | dict(zip([*own, *inside], runner.run(stage.arrays), strict=True))
        for name, node in nodes.items():
            tallies[name].append(_off(found[node.source], node.codes_in(found), node, _scale_of(name, layers)))
    return tuple(_node_agreement(name, rows) for name, rows in tallies.items())


def _node_agreement(name: str, rows: list[tuple[int, int, int]]) -> NodeAgreement:
    count, off = sum(row[0] for row in rows), sum(row[1] for row in rows)
    return NodeAgreement(name, count, 1 - off / max(1, count), max(row[2] for row in rows))


def _scale_of(quantizer: str, layers: Mapping[str, LayerSnapshot]) -> ActivationScale:
    site, _, kind = quantizer.rpartition(".")
    slot = next((slot for slot, name in QUANTIZER_NAMES.items() if name == kind), None)
    if slot is None or site not in layers or slot not in layers[site].activations:
        raise UserError(
            f"the file has a quantizer '{quantizer}' that the run does not have: it was made of another run"
        )
    return layers[site].activations[slot]


def _off(x: Array, codes: Array, node: _Quantize, activation: ActivationScale) -> tuple[int, int, int]:
    """Codes compared, codes that differ, and the largest distance.

    QuantizeLinear divides in the type of its scale (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html).
    """
    assert activation.scale is not None
    if activation.format.is_nested:
        blocks = quantize(tensor_of(x).to(node.dtype).float(), activation.format, outer_scale=activation.scale.cpu())
        distance = np.abs(_order(array_of(blocks.codes), 4) - _order(codes.view(np.uint8), 4))
        return distance.size, int((distance > 0).sum()), int(distance.max(initial=0))
    scale = (activation.scale.cpu() * node.factor).to(node.dtype)
    values = (tensor_of(x).to(node.dtype) / scale).float()
    zero_point = None if activation.zero_point is None else activation.zero_point.cpu()
    ours = array_of(quantize(values, activation.format, scale=torch.ones(()), zero_point=zero_point).codes)
    if isinstance(activation.format.element, IntFormat):
        shift = 128 if codes.dtype == np.uint8 and ours.dtype == np.int8 else 0
        distance = np.abs(ours.astype(np.int32) - (codes.astype(np.int32) - shift))
    else:
        bits = activation.format.element.bits
        distance = np.abs(_order(ours, bits) - _order(codes.view(np.uint8), bits))
    return distance.size, int((distance > 0).sum()), int(distance.max(initial=0))


def _order(patterns: Array, bits: int) -> Array:
    """Sign-magnitude patterns of so many bits as integers in the order of their values."""
    sign, wide = 1 << (bits - 1), patterns.astype(np.int32)
    return np.where(wide & sign, -(wide & (sign - 1)), wide & (sign - 1))
