"""Which layers the ModelOpt layout can hold, and under which label.

docs/formats/modelopt.md has the table, ``modelopt_rows`` its rows. The labels are those of ModelOpt 0.47, whose readers
look them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from octavo.export.modelopt_rows import (
    BLOCK_LABELS,
    FP4_LABELS,
    INT4_LABELS,
    PRE_SCALE_LABELS,
    Rounded,
    find_row,
    is_cache_fp8,
    is_cache_nvfp4,
)
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.plan import Decision
from octavo.spec.tensor_format import PerGroup, PerTensor, TensorFormat

ATTENTION_SLOTS = (Slot.QUERY, Slot.KEY, Slot.VALUE, Slot.SOFTMAX, Slot.ATTENTION_OUTPUT)
CACHE_SLOTS = (Slot.KEY_CACHE, Slot.VALUE_CACHE)
QUANTIZABLE = ("linear", "conv", "conv_transposed", "embedding")


@dataclass(frozen=True, slots=True)
class Label:
    """What a layer is called in ``hf_quant_config.json``.

    Args:
        algorithm: ``quant_algo``.
        group_size: Only where scales run over groups.
        has_inputs: An engine rounds the inputs.
        has_pre_scale: The input is multiplied by a vector first.
        rank: Of a low-rank branch, 0 without one.
    """

    algorithm: str
    group_size: int | None = None
    has_inputs: bool = False
    has_pre_scale: bool = False
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Extras:
    """What algorithms leave beside a layer."""

    has_pre_scale: bool = False
    rotates: bool = False
    rank: int = 0


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """What the layout has to hold for one layer, from a plan or from a snapshot."""

    name: str
    operation: str
    weight_shape: tuple[int, ...]
    quantizers: Mapping[Slot, Rounded]
    extras: Extras = Extras()
    weight_name: str = ""


def from_decision(decision: Decision) -> LayerFormats:
    """As planned."""
    quantizers = {slot: Rounded(spec.format, spec.is_dynamic) for slot, spec in decision.scheme.items()}
    site = decision.site
    return LayerFormats(site.name, site.operation, site.weight_shape, quantizers, weight_name=site.weight_name)


def from_layer(layer: LayerSnapshot) -> LayerFormats:
    """As it came out."""
    quantizers = {slot: Rounded(entry.format, entry.is_dynamic) for slot, entry in layer.activations.items()}
    if layer.weight is None:
        return LayerFormats(layer.name, layer.operation, (), quantizers)
    quantizers[Slot.WEIGHT] = Rounded(layer.weight.format)
    rank = 0 if layer.low_rank is None else layer.low_rank[0].shape[-2]
    extras = Extras(layer.pre_scale is not None, layer.input_rotation > 0, rank)
    return LayerFormats(layer.name, layer.operation, layer.weight.shape, quantizers, extras, layer.weight_name)


def label_of(layer: LayerFormats) -> Label | None:
    """The layer's label; ``None`` when the layout has none for it, or its weight stays as it is."""
    weight, inputs = layer.quantizers.get(Slot.WEIGHT), layer.quantizers.get(Slot.INPUT)
    if weight is None:
        return None
    row = find_row(weight.format, inputs, has_input=layer.operation != "embedding")
    if row is None:
        return None
    algorithm, extras = row.algorithm, layer.extras
    if algorithm == "NVFP4" and (extras.rank or extras.has_pre_scale):
        algorithm = "NVFP4_SVD" if extras.rank else "NVFP4_AWQ"
    has_pre_scale = extras.has_pre_scale or algorithm == "NVFP4_SVD"
    return Label(algorithm, _group_size(weight.format), inputs is not None, has_pre_scale, extras.rank)


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
        return f"the layout has no label for {_describe(layer)}{_hint(layer)}"
    return _name_problem(layer) or extras_problem(layer) or _shape_problem(layer, label)


def _name_problem(layer: LayerFormats) -> str | None:
    """A static input scale is called after its weight, so the weight must be called after its layer."""
    inputs = layer.quantizers.get(Slot.INPUT)
    if inputs is None or inputs.is_dynamic or not layer.weight_name:
        return None
    if layer.weight_name.removesuffix("weight").rstrip("._") == layer.name.removesuffix("(model)"):
        return None
    return f"the layout finds an input's scale by the name of its weight, which {layer.weight_name!r} does not fit"


def extras_problem(layer: LayerFormats) -> str | None:
    """Why the layout cannot hold what lies beside a layer that has a label; ``None`` when it can, or has no label."""
    extras, label = layer.extras, label_of(layer)
    if extras.rotates:
        return "the layout has no place for the rotation of its input"
    if label is None:
        return None
    if extras.rank and label.algorithm != "NVFP4_SVD":
        return f"the layout has a low-rank branch beside NVFP4 weights and inputs only, not under {label.algorithm}"
    if extras.has_pre_scale and label.algorithm not in PRE_SCALE_LABELS:
        return (
            f"the layout has no pre_quant_scale under {label.algorithm}, and its input's scale could not be folded: "
            "named when the model is quantized (--layout modelopt), such scales are left out"
        )
    if extras.has_pre_scale and layer.operation != "linear":
        return f"the layout has a pre_quant_scale for linear layers only, and this is a {layer.operation} layer"
    return None


def cache_algorithm(layers: Iterable[LayerFormats]) -> str | None:
    """``FP8`` or ``NVFP4`` when the recipe quantizes the cache, which ``layer_problem`` found to be one of them."""
    caches = [quantizer for layer in layers for slot, quantizer in layer.quantizers.items() if slot in CACHE_SLOTS]
    if not caches:
        return None
    return "NVFP4" if is_cache_nvfp4(caches[0]) else "FP8"


def cache_problem(layers: Iterable[tuple[LayerFormats, tuple[Slot, ...]]]) -> str | None:
    """Why the layout cannot hold what is planned for the caches: engines have one format for all of them.

    Args:
        layers: With the slots that each of them could have.
    """
    formats: dict[bool, str] = {}
    left = ""
    for layer, slots in layers:
        for slot in CACHE_SLOTS:
            if slot in layer.quantizers:
                formats.setdefault(is_cache_nvfp4(layer.quantizers[slot]), layer.name)
            elif slot in slots:
                left = left or f"{layer.name}.{QUANTIZER_NAMES[slot]}"
    if len(formats) > 1:
        return f"layer {formats[True]!r}: the layout has one format for all caches, and {formats[False]!r} has another"
    if formats and left:
        name = next(iter(formats.values()))
        return f"layer {name!r}: engines quantize all caches or none, and {left!r} stays as it is"
    return None


def _shape_problem(layer: LayerFormats, label: Label) -> str | None:
    rows, columns = layer.weight_shape[-2:]
    if len(layer.weight_shape) > 2:
        return f"the layout wants a module for each matrix, and the weight has shape {layer.weight_shape}"
    if label.algorithm in BLOCK_LABELS and layer.operation == "conv_transposed":
        return f"the layout has no label for blocks of a transposed convolution ({_describe(layer)})"
    if label.algorithm in FP4_LABELS and layer.operation == "conv":
        return f"the layout packs two inputs into a byte and has no such order for a convolution ({_describe(layer)})"
    if label.algorithm in INT4_LABELS and rows % 2:
        return f"the layout packs two rows into a byte, and out_features={rows} is odd"
    if label.algorithm == "FP8_PB_WO" and (rows % 128 or columns % 128):
        return f"the layout has whole tiles of 128x128, and the weight is {rows}x{columns}"
    if label.group_size is not None and columns % label.group_size:
        return f"the layout has full groups of {label.group_size}, and in_features={columns}"
    return None


def _group_size(fmt: TensorFormat) -> int | None:
    return fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else None


def _slot_problem(slot: Slot, quantizer: Rounded) -> str | None:
    if slot in (Slot.WEIGHT, Slot.INPUT):
        return None
    if slot in CACHE_SLOTS:
        if is_cache_fp8(quantizer) or is_cache_nvfp4(quantizer):
            return None
        return f"the layout has caches in E4M3 with one static scale or in NVFP4, not {_text(quantizer)}"
    if slot not in ATTENTION_SLOTS:
        return f"the layout has no place for {QUANTIZER_NAMES[slot]}"
    if quantizer.is_dynamic or not quantizer.format.is_symmetric or quantizer.format.granularity != PerTensor():
        return f"the layout keeps one symmetric static scale for {QUANTIZER_NAMES[slot]}, not {_text(quantizer)}"
    return None


def _describe(layer: LayerFormats) -> str:
    inputs = layer.quantizers.get(Slot.INPUT)
    return f"{layer.quantizers[Slot.WEIGHT].format} weights with {_text(inputs) if inputs else 'unquantized'} inputs"


def _hint(layer: LayerFormats) -> str:
    """What would fit in its place, where that is nearly the same."""
    weight, inputs = layer.quantizers[Slot.WEIGHT].format, layer.quantizers.get(Slot.INPUT)
    is_fp4 = find_row(weight, None, has_input=True) is not None and weight.is_nested
    if is_fp4 and inputs is not None and is_cache_fp8(inputs):
        return " (kernels unpack FP4 to FP8, where such group scales overflow; weights in 'nvfp4-in-fp8' fit)"
    return ""


def _text(quantizer: Rounded) -> str:
    return f"{'dynamic' if quantizer.is_dynamic else 'static'} {quantizer.format}"
