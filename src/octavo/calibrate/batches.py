"""One pass of data through a model whose quantizers observe; nothing is kept but their statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import UserError
from octavo.numerics.door import Door
from octavo.report.progress import Track, silent
from octavo.spec.facts import Slot
from octavo.spec.plan import Plan
from octavo.spec.records import BlockRecord
from octavo.spec.select import quantizer_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration left.

    Args:
        num_batches: Forward passes that were observed.
        off: Quantizer name -> why it stays off.
        expert_tokens: Layer of experts -> tokens that each of them got.
        blocks: Errors of every block that steps worked on, and of every step in it.
        notes: What steps left alone, and why.
    """

    num_batches: int
    off: dict[str, str] = field(default_factory=dict)
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    blocks: tuple[BlockRecord, ...] = ()
    notes: tuple[str, ...] = ()


def needs_data(plan: Plan) -> list[str]:
    """Quantizers whose range only data can tell: static ones on activations, but not on probabilities."""
    known = (Slot.WEIGHT, Slot.SOFTMAX)
    return [
        quantizer_name(decision.site.name, slot)
        for decision in plan.decisions
        for slot, spec in decision.scheme.items()
        if not spec.is_dynamic and slot not in known
    ]


def require_no_data(plan: Plan) -> None:
    """Raise ``UserError`` when ``plan`` has ranges that only data can tell."""
    waiting = needs_data(plan)
    if waiting:
        raise UserError(
            f"recipe '{plan.recipe}' has {len(waiting)} static activation quantizers (such as '{waiting[0]}'), whose "
            "ranges only data can tell: give calibration data, or choose a dynamic or weight-only recipe"
        )


def calibrate(door: Door, plan: Plan, batches: Iterable[Any] | None, *, track: Track = silent) -> Calibrated:
    """Find every range of ``plan``: activations by one pass over ``batches``, weights by one look at each.

    Args:
        door: A prepared model.
        plan: What it was prepared with.
        batches: One forward pass each; not touched when no quantizer needs data.
        track: Told of every batch.

    Raises:
        UserError: the plan needs data and there is none.
        NotFiniteError: NaN or inf in an activation or a weight, with the quantizer's name.
    """
    num_batches = 0
    if batches is None:
        require_no_data(plan)
    elif needs_data(plan):
        with door.observe():
            for batch in track(batches, "calibrate"):
                door.run(batch)
                num_batches += 1
        if num_batches == 0:
            raise UserError("the calibration data is empty: it gave no batch")
    off = dict(door.finish_calibration())
    for name, why in off.items():
        logger.warning("quantizer '%s' stays off: %s", name, why)
    tokens = {layer: list(counts) for layer, counts in door.expert_tokens().items()}
    return Calibrated(num_batches, off, tokens)
