"""Double quantization as a rewriting of formats (QLoRA, arXiv:2305.14314, section 3): scales are tensors, too.

With its defaults the scales are stored as bitsandbytes stores them: their mean in fp32 is subtracted, and what is left
is rounded to the 8-bit dynamic codebook in blocks of 256, each with an fp32 scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.spec.element import ELEMENTS
from octavo.spec.facts import Slot
from octavo.spec.plan import Decision
from octavo.spec.steps import DoubleQuantization, Step, matcher
from octavo.spec.tensor_format import PLAIN_FP32, PerFlatGroup, PerTensor, TensorFormat


def why_not_doubled(fmt: TensorFormat) -> str:
    """Why the scales of ``fmt`` are not quantized by the step; empty when they are.

    >>> from octavo.spec.formats import NVFP4
    >>> why_not_doubled(NVFP4)
    'its scales are e4m3 per tensor already'
    """
    if fmt.scale is None:
        return f"{fmt} has no scales"
    if isinstance(fmt.granularity, PerTensor):
        return "it has a single scale"
    return "" if fmt.scale == PLAIN_FP32 else f"its scales are {fmt.scale} already"


def doubled(fmt: TensorFormat, options: DoubleQuantization) -> TensorFormat:
    """``fmt`` with its fp32 scales stored as the step says.

    >>> from octavo.spec.formats import tensor_format
    >>> nf4, twice = tensor_format("nf4"), tensor_format("nf4-double-quant")
    >>> doubled(nf4, DoubleQuantization()) == twice
    True
    """
    scales = TensorFormat(ELEMENTS[options.scales], PerFlatGroup(options.block), scale=PLAIN_FP32)
    if options.centre:
        scales = replace(scales, offset=PLAIN_FP32, offset_granularity=PerTensor())
    return replace(fmt, scale=scales)


def with_doubled_scales(decisions: tuple[Decision, ...], steps: Sequence[Step]) -> tuple[Decision, ...]:
    """The decisions with the formats of weights as the recipe's double quantization leaves them.

    Raises:
        UserError: a pattern of the step matches no layer whose weight is quantized.
    """
    for step in steps:
        options = step.options
        if isinstance(options, DoubleQuantization):
            chosen = matcher(step, [decision.site for decision in decisions if decision.weight is not None])
            decisions = tuple(_rewritten(d, options) if d.site.name in chosen else d for d in decisions)
    return decisions


def _rewritten(decision: Decision, options: DoubleQuantization) -> Decision:
    spec = decision.weight
    if spec is None or why_not_doubled(spec.format):
        return decision
    return replace(
        decision, scheme={**decision.scheme, Slot.WEIGHT: replace(spec, format=doubled(spec.format, options))}
    )
