"""What a plan allows, but a user should know before any work is done. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from octavo.spec.facts import QUANTIZER_NAMES, Slot
from octavo.spec.plan import Decision, Plan
from octavo.spec.targets import Target


def warnings_of(plan: Plan, target: Target) -> tuple[str, ...]:
    """One sentence each: what the sample does not get to, what is slow, what a runtime does otherwise."""
    return (
        *_unreached(plan.decisions),
        *_costs(plan.decisions),
        *_saturating(plan.decisions, target),
        *_norms_between(plan.decisions, target),
        *_fused(plan),
    )


def _unreached(decisions: Sequence[Decision]) -> list[str]:
    """Parts that a rule quantizes and the sample did not get to."""
    found = Counter(d.site.unreached for d in decisions if d.scheme and d.site.unreached)
    return [
        f"the sample does not get to '{part}' ({number} site{'s' * (number > 1)}): give data that does, "
        "or its static input quantizers stay off"
        for part, number in found.items()
    ]


def _costs(decisions: Sequence[Decision]) -> list[str]:
    """What is slower or larger than a user may expect."""
    written_out = [d.site for d in decisions if d.site.fused_call and Slot.SOFTMAX in d.scheme]
    if not written_out:
        return []
    first = written_out[0]
    return [
        f"{len(written_out)} attention calls (such as {first.name!r}) are fused by {first.fused_call}: with a "
        f"{QUANTIZER_NAMES[Slot.SOFTMAX]} they are written out, which costs time, and memory for all probabilities"
    ]


def _saturating(decisions: Sequence[Decision], target: Target) -> list[str]:
    """Products of bytes that lose something where the target adds them in 16 bits."""
    names = [d.site.name for d in decisions if target.saturates_at(d.site, d.scheme)]
    if not names:
        return []
    return [
        f"{len(names)} layers (such as {names[0]!r}) multiply 8-bit weights by 8-bit inputs, whose sums saturate on "
        "x86 processors without VNNI; the simulation knows it. Ways out: --target onnxruntime-cpu (7-bit weights), or "
        "onnxruntime's session option session.x64quantprecision, which is slower"
    ]


def _norms_between(decisions: Sequence[Decision], target: Target) -> list[str]:
    """Batch norms that a runtime computes in float between convolutions that it computes in integers."""
    in_integers = any(d.site.operation == "conv" and Slot.OUTPUT in d.scheme for d in decisions)
    norms = [d for d in decisions if (d.site.stays or d.site.folds_into) and not d.folded_into]
    if not target.quantizes_conv_outputs or not in_integers or not norms:
        return []
    return [
        f"{len(norms)} batch norms (such as {norms[0].site.name!r}: {norms[0].why or norms[0].rule}) are not folded "
        f"into convolutions, and {target.name} computes them in float"
    ]


def _fused(plan: Plan) -> list[str]:
    """What is decided for several layers together."""
    groups = plan.fused_weights()
    if not groups:
        return []
    more = f"; {len(groups)} groups" if len(groups) > 1 else ""
    some = ", ".join(name.rpartition(".")[2] for name in groups[0])
    return [
        f"layers that read the same tensor ({some}{more}) share the scale of their weights' scales, "
        "because engines join them"
    ]
