"""Where files will run, as data: what each target can run fast, and so what a plan for it may ask for.

The target is an input of ``resolve``: it fixes zero points, weight bits and granularity of activations before anything
is simulated, so that what was judged is what is deployed. Every rule names where it comes from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from octavo.errors import UserError
from octavo.spec.element import E4M3, E8M0, INT7, INT8, IntFormat
from octavo.spec.facts import SiteFacts, Slot
from octavo.spec.plan import ObserverSpec, QuantizerSpec
from octavo.spec.tensor_format import PerChannel, PerTensor, TensorFormat, scaled

_ORT_QUANTIZATION = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_TENSORRT_TYPES = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html"
_TENSORRT_ATTENTION = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html"
)
_TENSORRT_BLOCKS = "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/DynamicQuantize.html"
_OPENVINO_LPT = "https://docs.openvino.ai/2026/openvino-workflow/model-optimization.html"


class ZeroPoints(Enum):
    """What a target wants of static integer activations."""

    AS_ASKED = "as the recipe says"
    NONE = "symmetric"
    WANTED = "asymmetric"


class Sums(Enum):
    """What a target wants of sums of what quantized convolutions give (residual connections)."""

    IN_FLOAT = "nothing quantized"
    SKIP = "what skips the convolution quantized: the sum is fused into the convolution"
    ALL = "both sides and the output quantized: the sum is computed in integers"


@dataclass(frozen=True, slots=True)
class PlacementRule:
    """One thing that a target wants, and who says so."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime on a kind of machine.

    Args:
        name: What users call it.
        description: One line.
        zero_points: Of static integer activations.
        weight_bits: Of integer weights that meet integer activations.
        dynamic_per_tensor: Dynamic integer activations have one scale and one zero point per call.
        dynamic_integers: Whether integer activations can be dynamic at all.
        unsigned_codes: Codes of 8-bit activations are stored as UINT8.
        quantizes_conv_outputs: A convolution of integers runs in integers only when its output is quantized, too.
        integer_biases: Biases of products of 8-bit integers are stored in INT32.
        quantizes_softmax: Attention in FP8 is fused only with its softmax in FP8, at scale 1/448.
        sums: What it wants of residual sums.
        saturates: Sums of two products of bytes saturate in 16 bits; simulation knows it.
        scales_queries: Queries are multiplied by attention's scaling before they are quantized, not the scores.
        symmetric_weights: Integer weights cannot have zero points.
        one_kind: A product takes integers with integers and small floats with small floats.
        plain_block_scales: Scales that are powers of two are stored as numbers of the float type.
        fp4_blocks: Inputs in NVFP4 are written by an operator of the target's own, because there is no standard one.
        sums_apart: Residual sums in front of norms are written so that the two are not fused.
        rules: Why.
    """

    name: str
    description: str
    zero_points: ZeroPoints = ZeroPoints.AS_ASKED
    weight_bits: int = 8
    dynamic_per_tensor: bool = False
    dynamic_integers: bool = True
    unsigned_codes: bool = False
    quantizes_conv_outputs: bool = False
    integer_biases: bool = False
    quantizes_softmax: bool = False
    sums: Sums = Sums.IN_FLOAT
    saturates: bool = False
    scales_queries: bool = False
    symmetric_weights: bool = False
    one_kind: bool = False
    plain_block_scales: bool = False
    fp4_blocks: bool = False
    sums_apart: bool = False
    rules: tuple[PlacementRule, ...] = field(default=())

    def format(self, slot: Slot, fmt: TensorFormat, *, is_dynamic: bool, meets_integers: bool) -> TensorFormat:
        """What ``fmt`` becomes here.

        Args:
            slot: Where it was asked for.
            fmt: What the recipe asks for.
            is_dynamic: Whether its range is found per call.
            meets_integers: Of a weight: whether what it meets is quantized to integers, too.
        """
        if not isinstance(fmt.element, IntFormat) or fmt.element.bits != 8:
            return fmt
        if slot is Slot.WEIGHT:
            narrower = meets_integers and self.weight_bits < 8 and fmt.is_symmetric
            return scaled(INT7, fmt.granularity) if narrower else fmt
        if is_dynamic:
            return scaled(INT8, PerTensor(), asymmetric=True) if self.dynamic_per_tensor else fmt
        match self.zero_points:
            case ZeroPoints.AS_ASKED:
                return fmt
            case ZeroPoints.NONE:
                return scaled(INT8, fmt.granularity)
            case ZeroPoints.WANTED:
                return scaled(INT8, fmt.granularity, asymmetric=True)

    def extra(self, site: SiteFacts, scheme: Mapping[Slot, QuantizerSpec]) -> dict[Slot, QuantizerSpec]:
        """Quantizers that the target wants although no rule asks for them.

        The output of a convolution gets what its input gets; a softmax between products in FP8 the fixed scale 1/448.
        """
        there = set(site.slots) - set(scheme)
        given = scheme.get(Slot.INPUT)
        is_conv = site.operation in ("conv", "conv_transposed") and Slot.WEIGHT in scheme
        if self.quantizes_conv_outputs and is_conv and given is not None and Slot.OUTPUT in there:
            is_integer = isinstance(given.format.element, IntFormat) and not given.is_dynamic
            return {Slot.OUTPUT: given} if is_integer else {}
        value = scheme.get(Slot.VALUE)
        if self.quantizes_softmax and value is not None and value.format.element == E4M3 and Slot.SOFTMAX in there:
            return {Slot.SOFTMAX: QuantizerSpec(scaled(E4M3, PerTensor()), observer=ObserverSpec("unit"))}
        return {}

    def residual(self, site: SiteFacts, sources: Sequence[Mapping[Slot, QuantizerSpec]]) -> dict[Slot, QuantizerSpec]:
        """Quantizers of a residual sum, as its sources have them; none where one of them is not quantized.

        Args:
            site: An ``add``.
            sources: Schemes of ``site.adds``.
        """
        match self.sums:
            case Sums.IN_FLOAT:
                return {}
            case Sums.ALL:
                specs = [scheme.get(Slot.OUTPUT) for scheme in sources]
                slots: tuple[Slot, ...] = (Slot.LEFT, Slot.RIGHT, Slot.OUTPUT)
            case Sums.SKIP:
                specs = [scheme.get(Slot.INPUT) or scheme.get(Slot.RIGHT) for scheme in sources]
                slots = (Slot.RIGHT,)
        given = specs[0] if specs else None
        if given is None or given.is_dynamic or any(spec is None for spec in specs):
            return {}
        return dict.fromkeys(slots, given)

    def saturates_at(self, site: SiteFacts, scheme: Mapping[Slot, QuantizerSpec]) -> bool:
        """Whether sums at a site may saturate: 8-bit inputs with one scale meet 8-bit weights with one per output."""
        weight, given = scheme.get(Slot.WEIGHT), scheme.get(Slot.INPUT)
        if not self.saturates or weight is None or given is None or site.operation not in ("linear", "conv"):
            return False
        is_wide = weight.format.element == INT8 and weight.format.is_symmetric
        in_rows = isinstance(weight.format.granularity, PerTensor | PerChannel)
        is_byte = given.format.element == INT8 and isinstance(given.format.granularity, PerTensor)
        computes_in_bytes = site.operation == "linear" or not given.is_dynamic
        return is_wide and in_rows and is_byte and computes_in_bytes

    def problem(self, site: SiteFacts, slot: Slot, fmt: TensorFormat, *, is_dynamic: bool) -> str:
        """Why the target cannot run a quantizer, with the way out; empty when it can."""
        dynamic_integer = is_dynamic and isinstance(fmt.element, IntFormat)
        if dynamic_integer and not self.dynamic_integers:
            return (
                f"{self.name} has no integer activations whose range is found per call ({site.name}, {slot.value}): "
                "choose a static recipe such as int8, or one of weights only"
            )
        if self.symmetric_weights and slot is Slot.WEIGHT and not fmt.is_symmetric:
            return (
                f"{self.name} has no weights with zero points ({site.name} is {fmt}): "
                "choose a symmetric format such as int4-group"
            )
        return ""

    def clash(self, site: SiteFacts, scheme: Mapping[Slot, QuantizerSpec]) -> str:
        """Why the target cannot multiply what a site quantizes, with the way out; empty when it can."""
        weight, given = scheme.get(Slot.WEIGHT), scheme.get(Slot.INPUT)
        if not self.one_kind or weight is None or given is None:
            return ""
        are_alike = isinstance(weight.format.element, IntFormat) == isinstance(given.format.element, IntFormat)
        has_powers = weight.format.scale is not None and weight.format.scale.element == E8M0
        if are_alike and not has_powers:
            return ""
        return (
            f"{self.name} multiplies integers with integers, and small floats without E8M0 scales with such; "
            f"{site.name} has weights in {weight.format} and inputs in {given.format}: "
            "choose int8 or fp8 for both, or quantize weights only"
        )


_U8S8 = PlacementRule("activations UINT8 and asymmetric, weights INT8 and symmetric per channel", _ORT_QUANTIZATION)
_SATURATION = PlacementRule(
    "7-bit weights: without VNNI the sum of two U8 x S8 products saturates in 16 bits", _ORT_QUANTIZATION
)
_SATURATES = PlacementRule(
    "8-bit weights: the sum of two U8 x S8 products saturates in 16 bits, which costs accuracy and is simulated",
    _ORT_QUANTIZATION,
)
_DYNAMIC = PlacementRule(
    "dynamic activations: one asymmetric UINT8 range per call, the pattern that becomes DynamicQuantizeMatMul",
    _ORT_QUANTIZATION,
)
_CONV = PlacementRule(
    "outputs of convolutions are quantized, behind a ReLU that follows: else the convolution computes in float",
    "https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/core/optimizer/qdq_transformer/selectors_actions",
)
_SUMS = PlacementRule(
    "sums of what quantized convolutions give: both sides and the output, which makes QLinearAdd",
    "https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/core/optimizer/qdq_transformer/selectors_actions",
)
_NORMS = PlacementRule(
    "residual sums in front of norms as Sum: fused into SkipLayerNormalization they take longer on a CPU",
    "https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/skip_layer_norm_fusion.cc",
)
_BIAS = PlacementRule("biases of Gemm and Conv in INT32 at the scale of the product, zero point 0", _ORT_QUANTIZATION)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "onnxruntime-cpu",
            "ONNX Runtime on any x86 or Arm processor: weights in 7 bits, so that nothing saturates without VNNI",
            zero_points=ZeroPoints.WANTED,
            weight_bits=7,
            dynamic_per_tensor=True,
            unsigned_codes=True,
            quantizes_conv_outputs=True,
            integer_biases=True,
            sums=Sums.ALL,
            sums_apart=True,
            rules=(_U8S8, _SATURATION, _DYNAMIC, _CONV, _SUMS, _NORMS, _BIAS),
        ),
        Target(
            "onnxruntime-cpu-vnni",
            "ONNX Runtime on processors with VNNI (or Arm dot products): weights in 8 bits",
            zero_points=ZeroPoints.WANTED,
            dynamic_per_tensor=True,
            unsigned_codes=True,
            quantizes_conv_outputs=True,
            integer_biases=True,
            sums=Sums.ALL,
            sums_apart=True,
            rules=(_U8S8, _DYNAMIC, _CONV, _SUMS, _NORMS, _BIAS),
        ),
        Target(
            "onnxruntime-cpu-avx2",
            "ONNX Runtime on x86 processors without VNNI, weights in 8 bits all the same: what saturates is simulated",
            zero_points=ZeroPoints.WANTED,
            dynamic_per_tensor=True,
            unsigned_codes=True,
            quantizes_conv_outputs=True,
            integer_biases=True,
            sums=Sums.ALL,
            sums_apart=True,
            saturates=True,
            rules=(_U8S8, _SATURATES, _DYNAMIC, _CONV, _SUMS, _NORMS, _BIAS),
        ),
        Target(
            "onnxruntime-cuda",
            "ONNX Runtime on NVIDIA GPUs, by its CUDA provider",
            zero_points=ZeroPoints.NONE,
            rules=(PlacementRule("activations and weights INT8 and symmetric", _ORT_QUANTIZATION),),
        ),
        Target(
            "tensorrt",
            "TensorRT and TensorRT for RTX: symmetric, explicit Q/DQ",
            zero_points=ZeroPoints.NONE,
            dynamic_integers=False,
            quantizes_softmax=True,
            scales_queries=True,
            symmetric_weights=True,
            one_kind=True,
            plain_block_scales=True,
            fp4_blocks=True,
            sums=Sums.SKIP,
            rules=(
                PlacementRule("what skips a convolution is quantized before it is added", _TENSORRT_TYPES),
                PlacementRule("attention in FP8 is fused with the softmax at scale 1/448", _TENSORRT_TYPES),
                PlacementRule("queries are scaled before their Q/DQ and the first product", _TENSORRT_ATTENTION),
                PlacementRule("symmetric only: every zero point is 0", _TENSORRT_TYPES),
                PlacementRule("activations per tensor, weights per channel or in blocks", _TENSORRT_TYPES),
                PlacementRule("no Q/DQ on outputs; the graph's types are obeyed", _TENSORRT_TYPES),
                PlacementRule("operands of a product are of one kind: its builder refuses FP8 x INT4", _TENSORRT_TYPES),
                PlacementRule("E8M0 scales as numbers of the float type: its parser knows no E8M0", _TENSORRT_TYPES),
                PlacementRule("inputs in NVFP4 by TRT_FP4DynamicQuantize, scales of blocks in E4M3", _TENSORRT_BLOCKS),
            ),
        ),
        Target(
            "openvino",
            "OpenVINO on any processor: weights in 7 bits, so that nothing saturates without VNNI",
            zero_points=ZeroPoints.WANTED,
            weight_bits=7,
            unsigned_codes=True,
            rules=(PlacementRule("activations UINT8, weights INT8 and symmetric", _OPENVINO_LPT), _SATURATION),
        ),
    )
}
"""To add a target, add an entry: ``resolve``, the ONNX layout and ``--target`` pick it up."""

_ENGINES = ("vllm", "sglang", "tensorrt-llm", "transformers", "llama.cpp")
CHECKPOINT_TARGETS = {name: Target(name, f"{name}, from a checkpoint: what the recipe says") for name in _ENGINES}
"""Engines that read checkpoints: which formats they take is their layout's business."""

ANYWHERE = Target("", "what the recipe says, in standard operators")


def target_named(name: str) -> Target:
    """The target called ``name``; empty for anywhere.

    Raises:
        UserError: there is none; the message names the nearest and all of them.
    """
    if not name:
        return ANYWHERE
    known = TARGETS | CHECKPOINT_TARGETS
    if name in known:
        return known[name]
    near = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?  " if near else ""
    raise UserError(f"unknown target {name!r}: {hint}targets are {', '.join(known)}")
