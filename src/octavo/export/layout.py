"""``layout.json`` of a run directory: every layer of a snapshot without its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import UserError
from octavo.numerics.snapshot import ActivationScale, LayerSnapshot
from octavo.spec.facts import Slot
from octavo.spec.tensor_format import Shape, TensorFormat

LAYOUT_SCHEMA = "octavo.layout/1"


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a quantized weight lies in the files: ``shape`` as a matrix, ``parameter_shape`` in the model."""

    key: str
    format: TensorFormat
    shape: Shape
    parameter_shape: Shape
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class ActivationLayout:
    """An activation quantizer; ``has_scale`` and ``has_zero_point`` say which tensors it has in the files."""

    format: TensorFormat
    is_dynamic: bool
    has_scale: bool
    has_zero_point: bool


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer."""

    name: str
    operation: str
    weight: WeightLayout | None
    activations: Mapping[Slot, ActivationLayout]
    has_pre_scale: bool
    input_rotation: int
    has_low_rank: bool
    fusion_group: str


def layer_layout(layer: LayerSnapshot) -> LayerLayout:
    """``layer`` without its tensors."""
    weight = None
    if layer.weight is not None:
        shape, parameter_shape = tuple(layer.weight.shape), tuple(layer.weight_shape)
        weight = WeightLayout(layer.weight_name, layer.weight.format, shape, parameter_shape, layer.is_transposed)
    activations = {slot: _activation_layout(activation) for slot, activation in layer.activations.items()}
    return LayerLayout(
        layer.name,
        layer.operation,
        weight,
        activations,
        has_pre_scale=layer.pre_scale is not None,
        input_rotation=layer.input_rotation,
        has_low_rank=layer.low_rank is not None,
        fusion_group=layer.fusion_group,
    )


def layer_to_dict(layer: LayerLayout) -> dict[str, Any]:
    """As plain JSON values; ``layer_from_dict`` reads it back."""
    return {
        "name": layer.name,
        "operation": layer.operation,
        "weight": None if layer.weight is None else _weight_to_dict(layer.weight),
        "activations": {slot.value: _activation_to_dict(entry) for slot, entry in layer.activations.items()},
        "has_pre_scale": layer.has_pre_scale,
        "input_rotation": layer.input_rotation,
        "has_low_rank": layer.has_low_rank,
        "fusion_group": layer.fusion_group,
    }


def layer_from_dict(data: Mapping[str, Any]) -> LayerLayout:
    """The layer that ``layer_to_dict`` wrote.

    Raises:
        UserError: it did not.
    """
    try:
        return LayerLayout(
            name=data["name"],
            operation=data["operation"],
            weight=None if data["weight"] is None else _weight_from_dict(data["weight"]),
            activations={Slot(slot): _activation_from_dict(entry) for slot, entry in data["activations"].items()},
            has_pre_scale=bool(data["has_pre_scale"]),
            input_rotation=int(data["input_rotation"]),
            has_low_rank=bool(data["has_low_rank"]),
            fusion_group=data["fusion_group"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"layout.json: not a layer ({type(error).__name__}: {error})") from error


def _activation_layout(activation: ActivationScale) -> ActivationLayout:
    has_zero_point = activation.zero_point is not None
    return ActivationLayout(activation.format, activation.is_dynamic, activation.scale is not None, has_zero_point)


def _weight_to_dict(weight: WeightLayout) -> dict[str, Any]:
    return {
        "key": weight.key,
        "format": weight.format.to_dict(),
        "shape": list(weight.shape),
        "parameter_shape": list(weight.parameter_shape),
        "is_transposed": weight.is_transposed,
    }


def _weight_from_dict(data: Mapping[str, Any]) -> WeightLayout:
    shape, parameter_shape = (tuple(int(n) for n in data[name]) for name in ("shape", "parameter_shape"))
    return WeightLayout(
        data["key"], TensorFormat.from_dict(data["format"]), shape, parameter_shape, data["is_transposed"]
    )


def _activation_to_dict(entry: ActivationLayout) -> dict[str, Any]:
    return {
        "format": entry.format.to_dict(),
        "is_dynamic": entry.is_dynamic,
        "has_scale": entry.has_scale,
        "has_zero_point": entry.has_zero_point,
    }


def _activation_from_dict(data: Mapping[str, Any]) -> ActivationLayout:
    fmt = TensorFormat.from_dict(data["format"])
    return ActivationLayout(fmt, data["is_dynamic"], data["has_scale"], data["has_zero_point"])
