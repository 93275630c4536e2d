"""A quantized graph as the stream of layers that exporters take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from octavo.numerics.arrays import tensor_of
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.onnx.beside import factors_of, initializers_of, rotation_of
from octavo.onnx.graph import GraphSite
from octavo.onnx.marked import Found
from octavo.onnx.pre_scales import pre_scale_of
from octavo.spec.facts import Slot
from octavo.spec.plan import Decision, Plan
from octavo.spec.select import quantizer_name

SMALL_BYTES = 1024
"""Initializers up to here stay in the graph; larger ones are tensors of the run."""


class GraphSnapshot:
    """``numerics.snapshot.Snapshot`` of a calibrated graph."""

    def __init__(self, model: ir.Model, plan: Plan, sites: Mapping[str, GraphSite], found: Found) -> None:
        self.model = model
        self.plan = plan
        self.sites = sites
        self.found = found

    def layers(self) -> Iterator[LayerSnapshot]:
        """See ``Snapshot.layers``."""
        for decision in self.plan.decisions:
            names = {slot: quantizer_name(decision.site.name, slot) for slot in decision.scheme}
            on = [slot for slot, name in names.items() if name not in self.found.off]
            if on:
                yield self._layer(decision, on)

    def _layer(self, decision: Decision, on: Sequence[Slot]) -> LayerSnapshot:
        site, view = decision.site, self.sites[decision.site.name].view
        activations: dict[Slot, ActivationScale] = {}
        for slot in on:
            if slot is not Slot.WEIGHT:
                spec = decision.scheme[slot]
                scale, zero_point = self.found.ranges.get(quantizer_name(site.name, slot), (None, None))
                activations[slot] = ActivationScale(spec.format, spec.is_dynamic, scale, zero_point)
        group = min((site.name, *site.shares_input_with)) if site.shares_input_with and Slot.INPUT in on else ""
        if Slot.WEIGHT not in on or view is None:
            return LayerSnapshot(site.name, site.operation, activations=activations, fusion_group=group)
        return LayerSnapshot(
            site.name,
            site.operation,
            weight_name=site.weight_name,
            weight=_codes(self.found.weights[site.name]),
            weight_shape=view.shape,
            is_transposed=view.is_transposed,
            activations=activations,
            fusion_group=group,
            pre_scale=self._pre_scale(site.name),
            input_rotation=rotation_of(self.sites[site.name]),
            low_rank=factors_of(self.sites[site.name]),
        )

    def _pre_scale(self, name: str) -> Tensor | None:
        value = pre_scale_of(self.sites[name])
        return None if value is None or value.const_value is None else tensor_of(value.const_value.numpy()).float()

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Snapshot.passthrough``."""
        quantized = {layer.weight_name for layer in self.layers()}
        quantized |= {name for site in self.sites.values() for name in initializers_of(site)}
        for name, value in self.model.graph.initializers.items():
            data = value.const_value
            if data is not None and data.nbytes > SMALL_BYTES and name not in quantized:
                yield name, tensor_of(data.numpy())

    def tied(self) -> Mapping[str, str]:
        """See ``Snapshot.tied``: readers of one initializer read it under one name."""
        return {}


def _codes(weight: QTensor | Tensor) -> QTensor:
    assert isinstance(weight, QTensor), "only who checks files brings values without codes, and writes none"
    return weight
