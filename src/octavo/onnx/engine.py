"""What TensorRT made of a graph, from the layers that its builder lists, and what it left in high precision.

The lines are those of the engine inspector (https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
engine-tools.html), which the builder logs, too, so that no GPU is needed to read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from octavo.onnx.lower import WEIGHT

_LOW = frozenset(("Int8", "FP8", "Int4", "FP4E2M1"))
_FUSED_ATTENTION = "_mha"
_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
_MOVES = frozenset(("Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Mul"))
_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: .*?, Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), Outputs: .*"
    r"Metadata: ?(?P<nodes>.*)$"
)
_TENSOR = re.compile(r"Name: .*?, Dimensions: \[(?P<shape>.*?)\].*?Datatype: (?P<dtype>\w+)")
_WEIGHT_BYTES = re.compile(r"Total Weights Memory: (\d+) bytes")
_NODE = re.compile(r"ONNX Layer: (.*?)\]")


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """What a layer reads: a size of -1 is known at run time."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_low(self) -> bool:
        """Whether it has 8 bits or fewer for a value."""
        return self.dtype in _LOW

    @property
    def num_values(self) -> int:
        """Of a constant."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One kernel of an engine.

    Args:
        name: TensorRT's; that of fused attention says so.
        inputs: Activations that it reads.
        constants: Weights, scales and biases in it.
        nodes: Names of the graph's nodes that it computes, or a part of them.
    """

    name: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    nodes: frozenset[str]

    @property
    def is_attention(self) -> bool:
        """Whether both products and the softmax are in it."""
        return _FUSED_ATTENTION in self.name

    @property
    def multiplies_in_low_precision(self) -> bool:
        """Whether its operands have 8 bits or fewer; masks and scales (one value, or one for each output) have more."""
        if self.is_attention:
            return any(tensor.is_low for tensor in self.inputs)
        matrices = [tensor for tensor in self.constants if sum(size > 1 for size in tensor.shape) > 1]
        return bool(self.inputs) and all(tensor.is_low for tensor in (*self.inputs, *matrices))


@dataclass(frozen=True, slots=True)
class Engine:
    """One graph built for one architecture.

    Args:
        num_bytes: Of the engine; 0 where there is none.
        weight_bytes: Of the constants in it, as TensorRT counts them ("Total Weights Memory"). TensorRT for RTX keeps
            the source of its kernels in an engine, too: up to half a megabyte for each quantized block of a
            transformer, more than for one in fp16. It strips weights (``STRIP_PLAN``) only where there is a GPU.
        file_bytes: Of the constants in the graph's file.
        problem: Why there is none, in TensorRT's words.
        needs: What the graph has that the architecture lacks; such an engine is not expected.
        wide_weights: Quantized weights that the engine holds in a float type.
        float_products: Products of quantized operands that are computed in float.
        unfused_attention: Softmax nodes that are not in one kernel with the products around them.
    """

    num_bytes: int = 0
    weight_bytes: int = 0
    file_bytes: int = 0
    problem: str = ""
    needs: str = ""
    wide_weights: tuple[str, ...] = ()
    float_products: tuple[str, ...] = ()
    unfused_attention: tuple[str, ...] = ()

    @property
    def is_expected(self) -> bool:
        """Built, with every quantized weight in low precision, or not possible on this architecture."""
        return bool(self.needs) or bool(self.num_bytes and not self.wide_weights)


def layers_in(log: Iterable[str]) -> list[EngineLayer]:
    """The layers that a builder listed among its messages.

    Args:
        log: Messages of a build with detailed profiling verbosity.
    """
    text = next((message for message in log if message.startswith("Layers:")), "")
    return [_layer(match) for match in map(_LINE.match, text.splitlines()) if match]


def _layer(match: re.Match[str]) -> EngineLayer:
    nodes = frozenset(_NODE.findall(match["nodes"]))
    return EngineLayer(match["name"], tuple(_tensors(match["inputs"])), tuple(_tensors(match["constants"])), nodes)


def _tensors(text: str) -> Iterator[EngineTensor]:
    for found in _TENSOR.finditer(text):
        shape = tuple(int(size) for size in found["shape"].split(",") if size)
        yield EngineTensor(shape, found["dtype"])


def judge(graph: ir.Graph, num_bytes: int, log: Sequence[str]) -> Engine:
    """Hold the engine that a builder talked about against the graph that it was built of."""
    layers = layers_in(log)
    said = next(filter(None, map(_WEIGHT_BYTES.match, log)), None)
    return Engine(
        num_bytes,
        int(said[1]) if said else 0,
        sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None),
        wide_weights=tuple(_wide_weights(graph, layers)),
        float_products=tuple(_float_products(graph, layers)),
        unfused_attention=tuple(_unfused_attention(graph, layers)),
    )


def _wide_weights(graph: ir.Graph, layers: list[EngineLayer]) -> Iterator[str]:
    """Weights that the layers which read them do not hold in low precision, in one piece or in several."""
    for node in graph:
        codes = node.inputs[0] if WEIGHT in node.metadata_props else None
        if codes is None or codes.const_value is None:
            continue
        size = math.prod(codes.const_value.shape.numpy())
        there = (tensor for layer in layers if node.name in layer.nodes for tensor in layer.constants)
        if sum(tensor.num_values for tensor in there if tensor.is_low) < size:
            yield node.metadata_props[WEIGHT]


def _float_products(graph: ir.Graph, layers: list[EngineLayer]) -> Iterator[str]:
    low = frozenset[str]().union(*(layer.nodes for layer in layers if layer.multiplies_in_low_precision))
    for node in graph:
        is_quantized = node.op_type in _PRODUCTS and all(_is_dequantized(value) for value in node.inputs[:2])
        if is_quantized and node.name not in low:
            yield str(node.name)


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is dequantized, directly or behind nodes that move or scale it."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _unfused_attention(graph: ir.Graph, layers: list[EngineLayer]) -> Iterator[str]:
    fused = frozenset[str]().union(*(layer.nodes for layer in layers if layer.is_attention))
    for node in graph:
        if node.op_type == "Softmax" and node.name not in fused:
            yield str(node.name)
