"""The coverage account: every parameter and every multiply-add of a model in exactly one row.

==================  ======================================================================
state               means
==================  ======================================================================
``quantized``       a weight with a quantizer, or products of quantized activations; by which rule
``left by rule``    a rule says that it stays; which
``left by default``  no rule says anything of it, or nothing can be quantized there; why
``not reached``     the sample did not get there; where
==================  ======================================================================

A weight that a rule quantizes counts as quantized wherever the sample went; warnings of the plan name what it missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from octavo.errors import UserError
from octavo.spec.facts import Slot

if TYPE_CHECKING:
    from octavo.spec.plan import Decision, Plan

NOT_A_WEIGHT = "not a weight: it stays beside the quantized one"
_MOST_NAMED = 5
_MOST_NAMED_OF_ROW = 3


class State(Enum):
    """What became of a part of the model."""

    QUANTIZED = "quantized"
    LEFT_BY_RULE = "left by rule"
    LEFT_BY_DEFAULT = "left by default"
    NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """Parts of the model that share a fate and its reason.

    Args:
        state: What became of them.
        reason: The rule, why they stay, or where the sample did not get to.
        num_parameters: Values in parameters, tied ones once.
        macs: Multiply-adds of the sample; ``None`` when no forward pass was traced.
        sites: Their names.
    """

    state: State
    reason: str
    num_parameters: int
    macs: int | None
    sites: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; of the names the first few."""
        named = list(self.sites[:_MOST_NAMED_OF_ROW])
        counted = {"num_parameters": self.num_parameters, "macs": self.macs, "num_sites": len(self.sites)}
        return {"state": self.state.value, "reason": self.reason, **counted, "sites": named}


@dataclass(slots=True)
class _Share:
    """What is counted for one row."""

    num_parameters: int = 0
    macs: int = 0


def coverage(decisions: Iterable[Decision], *, was_traced: bool) -> tuple[CoverageRow, ...]:
    """The account of a plan; its rows add up to the model, largest first within a state."""
    found: dict[tuple[State, str], dict[str, _Share]] = {}
    decisions = tuple(decisions)
    owners = {d.site.name: d.rule for d in decisions if d.weight is not None}
    for decision in decisions:
        for state, reason, share in _shares(decision, owners):
            of_row = found.setdefault((state, reason), {}).setdefault(decision.site.name, _Share())
            of_row.num_parameters += share.num_parameters
            of_row.macs += share.macs
    rows = [
        CoverageRow(
            state,
            reason,
            num_parameters=sum(share.num_parameters for share in sites.values()),
            macs=sum(share.macs for share in sites.values()) if was_traced else None,
            sites=tuple(sites),
        )
        for (state, reason), sites in found.items()
    ]
    order = list(State)
    return tuple(sorted(rows, key=lambda row: (order.index(row.state), -row.num_parameters, -(row.macs or 0))))


def _shares(decision: Decision, owners: Mapping[str, str]) -> Iterator[tuple[State, str, _Share]]:
    """The parts of one site: its products with their weight, and what else lives there.

    A site that is tied to a quantized one computes with the same rounded weight.
    """
    site = decision.site
    total = sum(site.parameters.values())
    weight = site.parameters.get(site.weight_name, 0)
    if not weight and site.weight_name and not site.tied_to:  # computed of what is stored
        weight = min(site.num_weights, total)
    rest = total - weight
    if site.tied_to:
        follows = (State.QUANTIZED, owners[site.tied_to]) if site.tied_to in owners and site.slots else _fate(decision)
        yield *follows, _Share(0, site.macs or 0)
        if rest:
            yield State.LEFT_BY_DEFAULT, NOT_A_WEIGHT, _Share(rest)
        return
    yield *_fate(decision), _Share(weight if weight else rest, site.macs or 0)
    if weight and rest:
        is_beside = decision.weight is not None
        state, reason = (State.LEFT_BY_DEFAULT, NOT_A_WEIGHT) if is_beside else _fate(decision)
        yield state, reason, _Share(rest)


def _fate(decision: Decision) -> tuple[State, str]:
    site = decision.site
    is_without_weight = not site.weight_name and bool(decision.scheme) and site.operation != "norm"
    if decision.weight is not None or is_without_weight:
        return State.QUANTIZED, decision.rule
    if decision.scheme:  # something else here is quantized
        by_rule = f"{Slot.WEIGHT.value}_quantizer left" in decision.why
        return (State.LEFT_BY_RULE if by_rule else State.LEFT_BY_DEFAULT), decision.why or "no rule gives it a format"
    if decision.rule:
        return State.LEFT_BY_RULE, decision.why
    if site.unreached:
        return State.NOT_REACHED, f"the sample does not get to '{site.unreached}'"
    return State.LEFT_BY_DEFAULT, decision.why


def check_coverage(plan: Plan, share: float) -> None:
    """Hold a plan against the least share of parameters that must have a quantized weight.

    Args:
        plan: Who gets what.
        share: Between 0 and 1.

    Raises:
        UserError: less is covered; the message names the largest parts that are not.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--require-coverage {share:g} is not a share between 0 and 1: 0.95 asks for 95 %")
    if plan.parameters_covered >= share:
        return
    total = plan.facts.num_parameters
    left = [row for row in plan.coverage() if row.state is not State.QUANTIZED and row.num_parameters]
    largest = sorted(left, key=lambda row: -row.num_parameters)[:_MOST_NAMED]
    lines = [
        f"  {100 * row.num_parameters / total:.1f} %  {row.sites[0]}{_others(row)}: {row.state.value}, {row.reason}"
        for row in largest
    ]
    head = f"{100 * plan.parameters_covered:.1f} % of the parameters get a quantized weight, less than the required "
    ways = "give these a rule, or require less"
    raise UserError("\n".join([f"{head}{100 * share:g} %; the largest parts that do not:", *lines, ways]))


def _others(row: CoverageRow) -> str:
    return f" and {len(row.sites) - 1} more" if len(row.sites) > 1 else ""
