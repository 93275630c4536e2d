"""Snapshots made by hand: what exporters take, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.numerics.qtensor import QTensor, quantize
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot, Snapshot
from octavo.spec.facts import QUANTIZER_NAMES, ModelFacts, SiteFacts, Slot
from octavo.spec.formats import tensor_format
from octavo.spec.plan import Decision, Plan, QuantizerSpec
from octavo.spec.tensor_format import TensorFormat

Format = str | TensorFormat


@dataclass
class Handmade:
    """A snapshot and the facts that go with it."""

    members: list[LayerSnapshot] = field(default_factory=list)
    kept: list[tuple[str, Tensor]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def layers(self) -> Iterator[LayerSnapshot]:
        yield from self.members

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.kept

    def tied(self) -> Mapping[str, str]:
        return self.aliases

    @property
    def plan(self) -> Plan:
        total = sum(decision.site.parameter_bytes for decision in self.decisions)
        facts = ModelFacts(
            "handmade", "Handmade", tuple(d.site for d in self.decisions), max(1, total // 4), total, was_traced=False
        )
        return Plan(facts, "by hand", tuple(self.decisions))


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """Values on a coarse binary grid: their scales and products are the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator) / 32


def add_layer(
    made: Handmade,
    name: str,
    shape: tuple[int, ...],
    weight: Format | None,
    inputs: Format | None = None,
    *,
    operation: str = "linear",
    is_dynamic: bool = False,
    is_transposed: bool = False,
    seed: int = 0,
    quantized: QTensor | None = None,
) -> None:
    """A layer whose parameter has ``shape`` (inputs first where ``is_transposed``); ``quantized`` spares the work."""
    value = matrix(*shape, seed=seed + len(made.decisions))
    seen = (value.transpose(0, 1) if is_transposed else value).flatten(1)
    scheme: dict[Slot, QuantizerSpec] = {}
    activations: dict[Slot, ActivationScale] = {}
    if weight is not None:
        scheme[Slot.WEIGHT] = QuantizerSpec(_format(weight))
    if inputs is not None:
        scheme[Slot.INPUT] = QuantizerSpec(_format(inputs), is_dynamic)
        activations[Slot.INPUT] = activation(inputs, is_dynamic=is_dynamic)
    key = f"{name}.weight"
    if weight is None:
        made.kept.append((key, value))
    if scheme:
        made.members.append(
            LayerSnapshot(
                name,
                operation,
                weight_name=key if weight is not None else "",
                weight=quantized or (quantize(seen, _format(weight)) if weight is not None else None),
                weight_shape=shape if weight is not None else (),
                is_transposed=is_transposed and weight is not None,
                activations=activations,
            )
        )
    made.decisions.append(Decision(_site(name, operation, tuple(seen.shape), key), scheme))


def add_extras(made: Handmade, **extras: object) -> None:
    """``pre_scale``, ``input_rotation`` or ``low_rank`` for the layer that was added last."""
    made.members[-1] = dataclasses.replace(made.members[-1], **extras)  # type: ignore[arg-type]


def some_extras(rows: int, columns: int) -> dict[str, object]:
    """A vector for the input and a branch of rank 2, of powers of two."""
    vector = 2.0 ** (torch.arange(columns) % 5 - 2)
    return {"pre_scale": vector, "low_rank": (matrix(2, columns), matrix(rows, 2))}


def expected_extras(snapshot: Snapshot) -> Iterator[tuple[str, np.ndarray]]:
    """What ``compare_weights`` takes."""
    for layer in snapshot.layers():
        if layer.pre_scale is not None:
            yield f"{layer.name}.pre_scale", layer.pre_scale.numpy()
        if layer.input_rotation:
            yield f"{layer.name}.input_rotation", np.asarray(layer.input_rotation)
        for part, factor in zip("ab", layer.low_rank or (), strict=False):
            yield f"{layer.name}.low_rank.{part}", factor.numpy()


def add_attention(made: Handmade, name: str, **formats: Format) -> None:
    """An attention call; ``query="e4m3-tensor"`` and so on."""
    slots = {Slot(slot): fmt for slot, fmt in formats.items()}
    activations = {slot: activation(fmt) for slot, fmt in slots.items()}
    made.members.append(LayerSnapshot(name, "attention", activations=activations))
    scheme = {slot: QuantizerSpec(_format(fmt)) for slot, fmt in slots.items()}
    made.decisions.append(Decision(SiteFacts(name, "attention", "Attention", tuple(slots)), scheme))


def activation(fmt: Format, *, is_dynamic: bool = False) -> ActivationScale:
    """Static with the scale 0.03125 (and zero point 3), or dynamic."""
    the_format = _format(fmt)
    if is_dynamic:
        return ActivationScale(the_format, True)
    zero_point = None if the_format.is_symmetric else torch.tensor(3, dtype=torch.int8)
    return ActivationScale(the_format, False, torch.tensor(0.03125), zero_point)


def activation_scales(snapshot: Snapshot) -> dict[str, float]:
    """Full quantizer name -> scale, of every static activation quantizer."""
    return {
        f"{layer.name}.{QUANTIZER_NAMES[slot]}": float(activation.scale)
        for layer in snapshot.layers()
        for slot, activation in layer.activations.items()
        if activation.scale is not None
    }


def small_fp8() -> Handmade:
    """Two linear layers, one left out, a norm, attention scales."""
    made = Handmade()
    add_layer(made, "blocks.0.up", (8, 16), "e4m3-tensor", "e4m3-tensor")
    add_attention(made, "blocks.0.attention", query="e4m3-tensor", softmax="e4m3-tensor")
    add_layer(made, "blocks.0.down", (16, 8), "e4m3-tensor", "e4m3-tensor")
    add_layer(made, "head", (4, 16), None)
    made.kept += [("norm.weight", torch.ones(16)), ("positions", torch.arange(5))]
    return made


def _format(fmt: Format) -> TensorFormat:
    return tensor_format(fmt) if isinstance(fmt, str) else fmt


def _site(name: str, operation: str, shape: tuple[int, ...], key: str) -> SiteFacts:
    count = shape[0] * shape[1]
    return SiteFacts(
        name,
        operation,
        "Linear",
        (Slot.WEIGHT, Slot.INPUT),
        weight_shape=shape,
        parameters={key: count},
        parameter_bytes=4 * count,
        weight_name=key,
    )
