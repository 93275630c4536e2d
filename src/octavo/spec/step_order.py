"""How the steps of a recipe go together: in which order, and what there is one of."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.errors import UserError
from octavo.spec.steps import Options, Rotate, Step


def fused_rotation(steps: Sequence[Step]) -> Rotate | None:
    """The step that rotates weights, ``None`` for none.

    Raises:
        UserError: there are two, or it is for some layers only.
    """
    found = [step for step in steps if isinstance(step.options, Rotate) and step.options.fused]
    if len(found) > 1:
        raise UserError("two steps rotate weights: give one of them, where: [residual, heads], and the other online")
    if found and found[0].select:
        raise UserError(
            f"step {found[0]}: what is rotated in the weights goes through the whole model, and 'select' takes a "
            "part of it: leave select out, or rotate online (where: [online])"
        )
    options = found[0].options if found else None
    return options if isinstance(options, Rotate) else None


def require_order(work: Sequence[tuple[Step, frozenset[str]]]) -> None:
    """Steps that move ranges come before rounding, scales before rotations, and a weight is rounded once.

    Args:
        work: Each step with the layers it is for, in order.

    Raises:
        UserError: two of them stand the other way round, for some layer.
    """
    for number, (later, layers) in enumerate(work):
        for earlier, others in work[:number]:
            why = _conflict(earlier.options, later.options) if layers & others else ""
            if why:
                raise UserError(f"steps: {why} (layer '{min(layers & others)}')")


def _conflict(earlier: Options, later: Options) -> str:
    if earlier.fixes and later.moves and not later.fixes:
        return f"'{later.name}' {later.moves} what '{earlier.name}' has rounded already: put it before"
    if earlier.fixes and later.fixes:
        instead = "write awq: {clip: false}" if earlier.name == "awq" else "give one of them other layers (select)"
        return f"'{later.name}' rounds what '{earlier.name}' has rounded already: {instead}, or leave one of them out"
    if earlier.leaves == "rotation" and later.moves == "scales":
        return f"'{later.name}' scales what '{earlier.name}' has rotated already: put it before"
    return ""
