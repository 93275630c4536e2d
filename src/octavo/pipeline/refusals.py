"""What is told before any work, with the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.algorithms.base import make_algorithms
from octavo.calibrate.batches import require_no_data
from octavo.calibrate.blockwise import matchers, require_data_for
from octavo.errors import UserError
from octavo.evaluate import Task
from octavo.export.base import exporter
from octavo.pipeline.runs import LAYOUTS
from octavo.report.fold import fold_problems
from octavo.sources import LoadedModel
from octavo.spec.plan import Decision, Plan
from octavo.spec.recipe import Recipe
from octavo.spec.resolve import for_target, with_sums
from octavo.spec.select import quantizer_name
from octavo.spec.targets import Target, target_named


def refuse_other_target(the_plan: Plan, target: str, layout: str) -> None:
    """Raise ``UserError`` when files for ``target`` would mean something else than what was simulated."""
    wanted = target_named(target)
    if not target or target == the_plan.target:
        return
    wanted_of_all = with_sums([for_target(decision, wanted) for decision in the_plan.decisions], wanted)
    for decision, asked in zip(the_plan.decisions, wanted_of_all, strict=True):
        why = _other_meaning(decision, asked, target_named(the_plan.target), wanted)
        if why:
            raise UserError(
                f"this run was made for {the_plan.target or 'any target'}: {why}. Quantize for it:  octavo quantize "
                f"{the_plan.facts.model} --recipe {the_plan.recipe} --target {target} --layout {layout} ..."
            )


def _other_meaning(decision: Decision, asked: Decision, made: Target, wanted: Target) -> str:
    """What of a decision would mean something else on ``wanted`` than it was simulated as; empty when nothing would."""
    if asked != decision:
        slot = next(slot for slot in asked.scheme if asked.scheme[slot] != decision.scheme.get(slot))
        name = quantizer_name(decision.site.name, slot)
        return f"'{name}' is {decision.scheme.get(slot, 'not there')}, and {wanted.name} wants {asked.scheme[slot]}"
    if made.saturates_at(decision.site, decision.scheme) != wanted.saturates_at(decision.site, decision.scheme):
        return f"sums in '{decision.site.name}' saturate on one of the two, which its simulation knew"
    return ""


def refuse_early(
    the_plan: Plan, batches: Iterable[Any] | None, layouts: Iterable[str], tasks: Sequence[Task], loaded: LoadedModel
) -> None:
    """Everything that can be known to fail, before any work."""
    if batches is None:
        require_no_data(the_plan)
    refuse_misfits(the_plan, layouts)
    for task in tasks:
        task.check(loaded)


def refuse_steps(the_plan: Plan, recipe: Recipe, batches: Iterable[Any] | None, layouts: Iterable[str]) -> None:
    """Steps that a layout has no place for, or that need data."""
    refuse_step_misfits(the_plan, recipe, layouts)
    if batches is None:
        require_data_for(make_algorithms(recipe.steps))


def refuse_step_misfits(the_plan: Plan, recipe: Recipe, layouts: Iterable[str]) -> None:
    """Steps that a layout has no place for."""
    chosen = matchers(the_plan, recipe.steps)
    for layout in layouts:
        _refuse(layout, exporter(layout, LAYOUTS).step_problems(the_plan, chosen))


def refuse_misfits(the_plan: Plan, layouts: Iterable[str]) -> None:
    """What the layouts cannot hold."""
    for layout in layouts:
        _refuse(layout, exporter(layout, LAYOUTS).problems(the_plan))


def _refuse(layout: str, problems: Sequence[str]) -> None:
    if problems:
        folded = fold_problems(problems)
        shown = "".join(f"\n  {problem}" for problem in folded[:5])
        more = f"\n  and {len(folded) - 5} more" if len(folded) > 5 else ""
        raise UserError(f"layout '{layout}' cannot hold this plan:{shown}{more}")
