"""The low-rank branches that steps will put beside layers, in the plan before there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.spec.beside import Beside
from octavo.spec.facts import SiteFacts
from octavo.spec.plan import Decision
from octavo.spec.steps import Step, SvdQuant, matcher


def with_branches(decisions: tuple[Decision, ...], steps: Sequence[Step]) -> tuple[Decision, ...]:
    """The decisions with the low-rank branches that ``steps`` will add.

    Whether a scale of an input can be folded is only known when it was tried, so none is counted beforehand.
    """
    for step in steps:
        if isinstance(step.options, SvdQuant):
            chosen = matcher(step, [decision.site for decision in decisions if decision.weight is not None])
            rank = step.options.rank
            decisions = tuple(
                replace(decision, beside=Beside(rank=rank))
                if decision.site.name in chosen and _takes_branch(decision.site, rank)
                else decision
                for decision in decisions
            )
    return decisions


def _takes_branch(site: SiteFacts, rank: int) -> bool:
    """A layer of its own, or a stack that a function computes with, whose matrices are larger than the branch."""
    num_axes = 3 if "#" in site.name else 2
    is_layer = site.operation == "linear" and len(site.weight_shape) == num_axes
    return is_layer and min(site.weight_shape[-2:]) > rank
