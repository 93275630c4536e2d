"""Which layers the ModelOpt layout can hold, and under which label.

docs/formats/modelopt.md has the table. The labels are those of ModelOpt 0.47, whose readers look them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.element import E4M3, INT4, INT8, INT8_NARROW
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.plan import Decision
from octavo.spec.tensor_format import PLAIN_FP32, PerChannel, PerGroup, PerTensor, PerToken, TensorFormat

ATTENTION_SLOTS = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
QUANTIZABLE = ("linear", "conv", "conv_transposed", "embedding")


@dataclass(frozen=True, slots=True)
class Label:
    """What a layer is called in ``hf_quant_config.json``; ``group_size`` only where scales run over groups."""

    algorithm: str
    group_size: int | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantizer without its tensors."""

    format: TensorFormat
    is_dynamic: bool = False


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """What the layout has to hold for one layer, from a plan or from a snapshot."""

    name: str
    operation: str
    out_features: int
    quantizers: Mapping[Slot, Rounded]


def from_decision(decision: Decision) -> LayerFormats:
    """As planned."""
    quantizers = {slot: Rounded(spec.format, spec.is_dynamic) for slot, spec in decision.scheme.items()}
    shape = decision.site.weight_shape
    out_features = shape[-2] if len(shape) > 1 else 0
    return LayerFormats(decision.site.name, decision.site.operation, out_features, quantizers)


def from_layer(layer: LayerSnapshot) -> LayerFormats:
    """As it came out."""
    quantizers = {slot: Rounded(entry.format, entry.is_dynamic) for slot, entry in layer.activations.items()}
    if layer.weight is None:
        return LayerFormats(layer.name, layer.operation, 0, quantizers)
    quantizers[Slot.WEIGHT] = Rounded(layer.weight.format)
    return LayerFormats(layer.name, layer.operation, layer.weight.shape[-2], quantizers)


def label_of(layer: LayerFormats) -> Label | None:
    """The layer's label; ``None`` when the layout has none for it, or its weight stays as it is."""
    weight, inputs = layer.quantizers.get(Slot.WEIGHT), layer.quantizers.get(Slot.INPUT)
    if weight is None or not weight.format.is_symmetric or weight.format.scale != PLAIN_FP32:
        return None
    match weight.format.element, weight.format.granularity:
        case element, PerTensor() if element == E4M3 and _is_static_e4m3(inputs, layer.operation):
            return Label("FP8")
        case element, PerChannel(-2) if element == E4M3 and _is_e4m3_per_token(inputs, layer.operation):
            return Label("FP8_PER_CHANNEL_PER_TOKEN")
        case element, PerChannel(-2) if element in (INT8, INT8_NARROW) and inputs is None:
            return Label("W8A16")
        case element, PerChannel(-2) if element in (INT8, INT8_NARROW) and _is_static(inputs, INT8):
            return Label("W8A8_SQ_PER_CHANNEL")
        case element, PerGroup(size) if element == INT4 and inputs is None and layer.operation != "conv_transposed":
            return Label("W4A16_AWQ", size)
        case _:
            return None


def layer_problem(layer: LayerFormats) -> str | None:
    """Why the layout cannot hold ``layer``; ``None`` when it can."""
    for slot, quantizer in layer.quantizers.items():
        problem = _slot_problem(slot, quantizer)
        if problem:
            return problem
    weight = layer.quantizers.get(Slot.WEIGHT)
    if weight is None:
        is_lone_input = Slot.INPUT in layer.quantizers
        return "the layout has no place for a quantized input of an unquantized weight" if is_lone_input else None
    label = label_of(layer)
    if label is None:
        return f"the layout has no label for {_describe(layer)}"
    if label.algorithm == "W4A16_AWQ" and layer.out_features % 2:
        return f"the layout packs two rows into a byte, and out_features={layer.out_features} is odd"
    return None


def _slot_problem(slot: Slot, quantizer: Rounded) -> str | None:
    if slot in (Slot.WEIGHT, Slot.INPUT):
        return None
    if slot not in ATTENTION_SLOTS:
        return f"the layout has no place for {QUANTIZER_NAMES[slot]}"
    if quantizer.is_dynamic or not quantizer.format.is_symmetric or quantizer.format.granularity != PerTensor():
        return f"the layout keeps one symmetric static scale for {QUANTIZER_NAMES[slot]}, not {_text(quantizer)}"
    return None


def _describe(layer: LayerFormats) -> str:
    inputs = layer.quantizers.get(Slot.INPUT)
    return f"{layer.quantizers[Slot.WEIGHT].format} weights with {_text(inputs) if inputs else 'unquantized'} inputs"


def _text(quantizer: Rounded) -> str:
    return f"{'dynamic' if quantizer.is_dynamic else 'static'} {quantizer.format}"


def _is_static_e4m3(inputs: Rounded | None, operation: str) -> bool:
    return _is_static(inputs, E4M3) or (inputs is None and operation == "embedding")


def _is_e4m3_per_token(inputs: Rounded | None, operation: str) -> bool:
    if inputs is None:
        return operation == "embedding"
    return inputs.is_dynamic and inputs.format.element == E4M3 and inputs.format.granularity == PerToken()


def _is_static(inputs: Rounded | None, element: object) -> bool:
    if inputs is None or inputs.is_dynamic or not inputs.format.is_symmetric:
        return False
    is_element = inputs.format.element == element or (element == INT8 and inputs.format.element == INT8_NARROW)
    return is_element and inputs.format.granularity == PerTensor()
