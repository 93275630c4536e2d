"""A simulated graph whose products of bytes are summed in 16 bits: it runs in pieces, and sums lose on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from octavo.backends.saturation import UNSIGNED
from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.qtensor import QTensor
from octavo.numerics.saturation import conv_lost, lost
from octavo.onnx.convolutions import geometry_of
from octavo.onnx.graph import GraphSite
from octavo.onnx.segments import Segments

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Product:
    """One product of bytes.

    Args:
        codes: Name of the codes of its input; ``scale`` and ``zero`` of what they are scaled by.
        weight: Integers in the shape of the parameter, outputs first.
        steps: One scale, or one for each output.
        node: The product.
    """

    codes: str
    scale: ir.Value
    zero: ir.Value
    weight: Tensor
    steps: Tensor
    node: ir.Node

    def less(self, y: Array, seen: Mapping[str, Array]) -> Array:
        """``y`` without what its sums lose."""
        codes = tensor_of(seen[self.codes])
        if codes.ndim == 2 and self.scale.const_value is None and _has_bias(self.node):
            return y  # onnxruntime computes a Gemm whose range is found per call in float
        shift = UNSIGNED if codes.dtype == torch.int8 else 0
        scale, zero = float(_read(self.scale, seen)), int(_read(self.zero, seen)) + shift
        if self.node.op_type != "Conv":
            gone = lost(codes.flatten(0, -2).int() + shift, self.weight).view(y.shape)
            steps = self.steps
        else:
            geometry = geometry_of(self.node, tuple(codes.shape[2:]), tuple(self.weight.shape[2:]))
            gone = conv_lost(codes.int() + shift, self.weight, geometry, zero)
            steps = self.steps.view(-1, *[1] * (y.ndim - 2))
        return array_of(tensor_of(y) - gone * (scale * steps))


class SaturatingGraph:
    """Runs ``model``, which simulates exact sums.

    Args:
        model: With its quantizers spelled out.
        sites: Site name -> site, of those whose sums saturate.
        weights: Site name -> codes.
    """

    def __init__(self, model: ir.Model, sites: Mapping[str, GraphSite], weights: Mapping[str, QTensor]) -> None:
        nodes = {node.name: node for node in model.graph}
        self.products: dict[str, _Product] = {}
        for name, site in sites.items():
            assert site.product is not None
            node = nodes[site.product.name]
            self.products[str(node.outputs[0].name)] = _product(node, site, weights[name])
        seen = {product.codes for product in self.products.values()}
        dynamic = (v for product in self.products.values() for v in (product.scale, product.zero))
        seen |= {str(value.name) for value in dynamic if value.const_value is None}
        self.segments = Segments(model, seen | self.products.keys(), ends=self.products)

    def run(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name."""
        seen: dict[str, Array] = {}

        def look(name: str, value: Array) -> Array:
            if name in self.products:
                return self.products[name].less(value, seen)
            seen[name] = value
            return value

        return self.segments.run(dict(arrays), look)


def _has_bias(node: ir.Node) -> bool:
    return node.op_type == "Gemm" or any(user.op_type == "Add" for user in node.outputs[0].consumers())


def _read(value: ir.Value, seen: Mapping[str, Array]) -> Array:
    return value.const_value.numpy() if value.const_value is not None else seen[str(value.name)]


def _product(node: ir.Node, site: GraphSite, weight: QTensor) -> _Product:
    given = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert given is not None
    assert given.op_type == "DequantizeLinear"
    codes, scale, zero = given.inputs
    assert codes is not None
    assert scale is not None
    assert zero is not None
    assert isinstance(weight.scale, Tensor)
    assert site.view is not None
    integers = site.view.to_parameter(weight.codes) if node.op_type == "Conv" else weight.codes
    steps = weight.scale.flatten() * node.attributes.get_float("alpha", 1.0)
    return _Product(str(codes.name), scale, zero, integers, steps, node)
