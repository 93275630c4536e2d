"""The rows of the ModelOpt layout: which weights with which inputs go under which label.

docs/formats/modelopt.md has them as a table. Only what lies in the files or is done by an engine counts: how a scale
was chosen does not, so the rules and limits of a format are left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.spec.element import E2M1, E4M3, E8M0, INT4, INT8, INT8_NARROW, ElementFormat
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleRule,
    TensorFormat,
)

NVFP4_GROUP, MX_GROUP = 16, 32
TOP_IN_FP8 = 448 / 6
"""Largest group scale of FP4 weights that a kernel unpacks to E4M3: 6 times that is E4M3's largest value."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A quantizer without its tensors."""

    format: TensorFormat
    is_dynamic: bool = False


Inputs = Rounded | None


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its label, and what it takes."""

    algorithm: str
    takes_weight: Callable[[TensorFormat], bool]
    takes_inputs: Callable[[Inputs], bool]


def _is_scaled(fmt: TensorFormat, granularity: Granularity, *elements: ElementFormat) -> bool:
    """One of ``elements`` with fp32 scales of this granularity, and nothing else to remember."""
    is_known = fmt.element in elements and fmt.granularity == granularity
    return is_known and fmt.scale == PLAIN_FP32 and _is_centred_on_zero(fmt)


def _is_centred_on_zero(fmt: TensorFormat) -> bool:
    return fmt.is_symmetric and fmt.offset is None


def _is_nvfp4(fmt: TensorFormat) -> bool:
    """E2M1 in groups of 16, scaled by E4M3, scaled per tensor by fp32."""
    scale = fmt.scale
    if fmt.element != E2M1 or fmt.granularity != PerGroup(NVFP4_GROUP) or scale is None:
        return False
    return _is_centred_on_zero(fmt) and _is_scaled(scale, PerTensor(), E4M3)


def _is_nvfp4_in_fp8(fmt: TensorFormat) -> bool:
    return _is_nvfp4(fmt) and fmt.scale is not None and fmt.scale.top_value <= TOP_IN_FP8


def _is_mx(fmt: TensorFormat, element: ElementFormat) -> bool:
    """Groups of 32, scaled by powers of two."""
    is_known = fmt.element == element and fmt.granularity == PerGroup(MX_GROUP) and _is_centred_on_zero(fmt)
    return is_known and fmt.scale is not None and fmt.scale.is_plain and fmt.scale.element == E8M0


def _is_int4_groups(fmt: TensorFormat) -> bool:
    return isinstance(fmt.granularity, PerGroup) and _is_scaled(fmt, fmt.granularity, INT4)


def _is_int8_channels(fmt: TensorFormat) -> bool:
    return _is_scaled(fmt, PerChannel(), INT8, INT8_NARROW)


def _unquantized(inputs: Inputs) -> bool:
    return inputs is None


def _static(granularity: Granularity, *elements: ElementFormat) -> Callable[[Inputs], bool]:
    return lambda inputs: (
        inputs is not None and not inputs.is_dynamic and _is_scaled(inputs.format, granularity, *elements)
    )


def _dynamic(granularity: Granularity, *elements: ElementFormat) -> Callable[[Inputs], bool]:
    return lambda inputs: inputs is not None and inputs.is_dynamic and _is_scaled(inputs.format, granularity, *elements)


def _dynamic_mx(element: ElementFormat) -> Callable[[Inputs], bool]:
    return lambda inputs: inputs is not None and inputs.is_dynamic and _is_mx(inputs.format, element)


def _static_nvfp4(inputs: Inputs) -> bool:
    """With the rule that kernels have: group scales from amax, found at every call."""
    if inputs is None or inputs.is_dynamic or not _is_nvfp4(inputs.format):
        return False
    return inputs.format.scale_rule is ScaleRule.AMAX and inputs.format.top is None


def _or_none(takes: Callable[[Inputs], bool]) -> Callable[[Inputs], bool]:
    return lambda inputs: inputs is None or takes(inputs)


_static_e4m3 = _static(PerTensor(), E4M3)

ROWS: tuple[Row, ...] = (
    Row("FP8", lambda fmt: _is_scaled(fmt, PerTensor(), E4M3), _static_e4m3),
    Row(
        "FP8_PER_CHANNEL_PER_TOKEN",
        lambda fmt: _is_scaled(fmt, PerChannel(), E4M3),
        _dynamic(PerToken(), E4M3),
    ),
    Row(
        "FP8_PB_WO",
        lambda fmt: _is_scaled(fmt, PerTile(128, 128), E4M3),
        _or_none(_dynamic(PerGroup(128), E4M3)),
    ),
    Row("W8A8_SQ_PER_CHANNEL", _is_int8_channels, _static(PerTensor(), INT8, INT8_NARROW)),
    Row("W8A16", _is_int8_channels, _unquantized),
    Row("W4A16_AWQ", _is_int4_groups, _unquantized),
    Row("W4A8_AWQ", _is_int4_groups, _static_e4m3),
    Row("NVFP4", _is_nvfp4, _static_nvfp4),
    Row("W4A16_NVFP4", _is_nvfp4, _unquantized),
    Row("W4A8_NVFP4_FP8", _is_nvfp4_in_fp8, _static_e4m3),
    Row("MXFP4", lambda fmt: _is_mx(fmt, E2M1), _or_none(_dynamic_mx(E2M1))),
    Row("W4A8_MXFP4_FP8", lambda fmt: _is_mx(fmt, E2M1), _static_e4m3),
    Row("MXFP8", lambda fmt: _is_mx(fmt, E4M3), _dynamic_mx(E4M3)),
)
INT4_LABELS = ("W4A16_AWQ", "W4A8_AWQ")
FP4_LABELS = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8")
BLOCK_LABELS = (*INT4_LABELS, *FP4_LABELS, "MXFP8", "FP8_PB_WO")
PRE_SCALE_LABELS = (*INT4_LABELS, "W8A8_SQ_PER_CHANNEL", "NVFP4_AWQ", "NVFP4_SVD")
"""Labels with a vector that the input is multiplied by; ``NVFP4`` becomes one of the last two with extras beside it."""
_ALIKE_WITHOUT_INPUTS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
"""An embedding looks rows up: it has no input to quantize, and takes these labels all the same."""


def find_row(weight: TensorFormat, inputs: Inputs, *, has_input: bool) -> Row | None:
    """The row that holds a layer.

    Args:
        weight: Format of the weight.
        inputs: What its input gets.
        has_input: False for an embedding.
    """
    for row in ROWS:
        is_alike = not has_input and inputs is None and row.algorithm in _ALIKE_WITHOUT_INPUTS
        if row.takes_weight(weight) and (is_alike or row.takes_inputs(inputs)):
            return row
    return None


def is_cache_fp8(quantizer: Rounded) -> bool:
    """Keys or values in E4M3 with one scale."""
    return _static_e4m3(quantizer)


def is_cache_nvfp4(quantizer: Rounded) -> bool:
    """Keys or values in NVFP4 along the head's axis."""
    return _static_nvfp4(quantizer)
