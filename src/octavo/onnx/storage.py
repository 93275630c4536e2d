"""How octavo's formats are spelled in ONNX: types of codes, the operator set they need, and what has no spelling.

Types by operator set (onnx's Operators.md, QuantizeLinear and DequantizeLinear): 21 has INT8, UINT8, INT4, UINT4,
FLOAT8E4M3FN, FLOAT8E5M2 and blocks along one axis; 23 adds FLOAT4E2M1; 24 adds FLOAT8E8M0 as the type of scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.spec.element import E2M1, E4M3, E5M2, E8M0, ElementFormat, FloatFormat, IntFormat
from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.formats import NVFP4
from octavo.spec.plan import Decision, Plan, QuantizerSpec
from octavo.spec.targets import target_named
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleRule,
    TensorFormat,
)

BASE_OPSET = 21
FP4_GROUP = 16
"""Neighbours that share a scale in TensorRT's operator for activations: those of NVFP4."""


@dataclass(frozen=True, slots=True)
class CodeType:
    """An ONNX tensor type by its name, and the operator set since which codes may have it."""

    name: str
    opset: int = BASE_OPSET


_FLOATS: dict[ElementFormat, CodeType] = {
    E4M3: CodeType("FLOAT8E4M3FN"),
    E5M2: CodeType("FLOAT8E5M2"),
    E2M1: CodeType("FLOAT4E2M1", 23),
    E8M0: CodeType("FLOAT8E8M0", 24),
}


def code_type(element: ElementFormat) -> CodeType | None:
    """The narrowest type that holds every code of ``element``; ``None`` where ONNX has none.

    >>> from octavo.spec.element import INT3, INT7, E3M2
    >>> code_type(INT3).name, code_type(INT7).name, code_type(E3M2)
    ('INT4', 'INT8', None)
    """
    if isinstance(element, IntFormat):
        return CodeType(f"{'INT' if element.is_signed else 'UINT'}{4 if element.bits <= 4 else 8}")
    return _FLOATS.get(element)


def opset_of(plan: Plan) -> int:
    """The lowest operator set that has every format of ``plan``."""
    needed = [opset_of_format(spec.format) for _, spec in plan.quantizers()]
    return max([BASE_OPSET, *needed])


def problems_of(plan: Plan) -> list[str]:
    """Why the operators of the plan's target cannot say what is planned: layer, reason, way out."""
    target = target_named(plan.target)
    found = []
    for decision in plan.decisions:
        for slot, spec in decision.scheme.items():
            why = weight_problem(spec.format) if slot is Slot.WEIGHT else _activation_problem(spec)
            if target.fp4_blocks and slot is not Slot.WEIGHT and spec.format == NVFP4:
                why = _blocks_problem(decision, slot, spec)
            if slot is Slot.WEIGHT and len(decision.site.weight_shape) > 2:
                why = "a stack of weights would need scales along two axes, which DequantizeLinear has not"
            if why:
                name = f"{decision.site.name}.{QUANTIZER_NAMES[slot]}"
                found.append(f"'{name}' is {spec}: {why}; {_way_out(decision)}")
    return found


def not_simulated(plan: Plan) -> str:
    """Why onnxruntime cannot simulate a graph's activations, by the first that it cannot; empty when it can."""
    for name, spec in plan.quantizers():
        if not name.endswith(QUANTIZER_NAMES[Slot.WEIGHT]):
            why = _activation_problem(spec)
            if spec.format.element == E2M1:
                why = why or "onnxruntime, which simulates graphs, has no FP4"
            if why:
                way_out = "choose a recipe of weights only or one of bytes, or quantize the torch model"
                return f"'{name}' is {spec}: {why}; {way_out}"
    return ""


def _way_out(decision: Decision) -> str:
    return f"choose another format, or --leave '{decision.site.name}'"


def weight_problem(fmt: TensorFormat) -> str:
    """Why a weight cannot be stored in ``fmt``; empty when it can."""
    if code_type(fmt.element) is None:
        return f"ONNX has no type for codes of {fmt.element.name}"
    if fmt.offset is not None:
        return "DequantizeLinear has no offset"
    if not isinstance(fmt.granularity, PerTensor | PerChannel | PerGroup | PerTile):
        return f"DequantizeLinear has no scales {fmt.granularity}"
    if isinstance(fmt.granularity, PerChannel) and fmt.granularity.axis != -2:
        return "only channels of the output axis are written"
    return _scale_problem(fmt.scale)


def _scale_problem(scale: TensorFormat | None) -> str:
    if scale is None or scale.is_plain:
        return ""
    if code_type(scale.element) is None:
        return f"ONNX has no type for scales of {scale.element.name}"
    if not isinstance(scale.granularity, PerTensor) or scale.offset is not None or scale.scale != PLAIN_FP32:
        return f"scales that are {scale} would need a chain of operators that no engine fuses"
    return ""


def _activation_problem(spec: QuantizerSpec) -> str:
    fmt = spec.format
    if fmt == NVFP4 and not spec.is_dynamic:
        return "blocks have no standard operator, but TensorRT has one: --target tensorrt"
    if not isinstance(fmt.element, IntFormat) and fmt.element not in (E4M3, E5M2, E2M1):
        return f"ONNX has no type for codes of {fmt.element.name}"
    if not spec.is_dynamic and not isinstance(fmt.granularity, PerTensor):
        return f"a static activation has one scale, not scales {fmt.granularity}"
    if fmt.scale != PLAIN_FP32 or fmt.scale_rule is not ScaleRule.AMAX or fmt.offset is not None:
        return "block scales that are found per call have no standard operator"
    if not isinstance(fmt.granularity, PerTensor | PerToken):
        return f"scales {fmt.granularity} that are found per call have no standard operator"
    return ""


def _blocks_problem(decision: Decision, slot: Slot, spec: QuantizerSpec) -> str:
    """Why an operator for NVFP4 activations cannot do it; empty when it can."""
    if spec.is_dynamic:
        return "the scale of the scales has to be fixed by calibration"
    if slot is not Slot.INPUT or decision.site.operation != "linear":
        return "only inputs of linear layers can be in blocks"
    width = decision.site.weight_shape[-1] if decision.site.weight_shape else 0
    if width % FP4_GROUP:
        return f"blocks of {FP4_GROUP} do not divide {width} channels"
    weight = decision.scheme.get(Slot.WEIGHT)
    is_alike = weight is not None and (weight.format.element, weight.format.granularity) == (E2M1, NVFP4.granularity)
    return "" if is_alike else "weights that meet it have to be in NVFP4, too"


def opset_of_format(fmt: TensorFormat) -> int:
    """The lowest operator set that stores weights in ``fmt``."""
    known = code_type(fmt.element)
    own = known.opset if known is not None else BASE_OPSET
    is_unit = not isinstance(fmt.element, IntFormat) or fmt.element.unit == 1.0
    if fmt.scale is None or fmt.scale == PLAIN_FP32 or not is_unit:
        return own
    return max(own, opset_of_format(fmt.scale))


def is_float(element: ElementFormat) -> bool:
    """Whether codes are small floats."""
    return isinstance(element, FloatFormat)
