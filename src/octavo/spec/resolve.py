"""From a recipe and a model's facts to a plan: who gets what, and why. Pure.

How rules combine, for every slot of every site:

1. Rules apply in order; the last one that says something about a slot wins. A scheme says something about the slots
   that it names, a ``leave`` about every slot that its patterns select.
2. A pattern that matches a site selects all its slots; one that matches a quantizer's name selects that slot.
3. A norm's input is the residual stream, a router decides which experts run, an adapter is what a user trains: a scheme
   reaches these only through a pattern that matches nothing else (``operation:norm``, ``*.layer_norm1``, ``*.router``),
   never through a broad one (``*input_quantizer``).
4. A site with an obstacle stays as it is, and says why. A site that uses another's parameter is decided there.
5. A target rewrites what the rules gave: zero points, weight bits, granularity (``spec/targets.py``). It adds what it
   wants besides: outputs of convolutions, residual sums that no rule speaks of.
6. A batch norm behind a layer that is quantized is folded into it, unless a rule speaks of the norm.
7. A double quantization among the recipe's steps rewrites the formats of scales (``spec/double_quantization.py``).
8. Every pattern of a rule must match something, and every slot of a scheme must exist at one of the selected sites,
   unless the rule is optional. A format that does not fit a weight, and a recipe that quantizes nothing, are errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

from octavo.errors import UserError
from octavo.spec.branches import with_branches
from octavo.spec.double_quantization import with_doubled_scales
from octavo.spec.element import IntFormat
from octavo.spec.experts import format_for
from octavo.spec.facts import QUANTIZER_NAMES, ModelFacts, Role, SiteFacts, Slot
from octavo.spec.plan import Decision, Plan, QuantizerSpec, Scheme
from octavo.spec.plan_warnings import warnings_of
from octavo.spec.recipe import Recipe
from octavo.spec.rule import Leave, Rule
from octavo.spec.select import Pattern, parse_pattern
from octavo.spec.suggest import no_match_message
from octavo.spec.targets import Target, target_named
from octavo.spec.tensor_format import PerGroup

_MOST_MISFITS = 3


def resolve(recipe: Recipe, facts: ModelFacts, target: str = "") -> Plan:
    """Decide every site of a model.

    Raises:
        UserError: a pattern matches nothing, a slot exists nowhere, formats do not fit, nothing is quantized, or the
            target is unknown or cannot run what is asked for.
    """
    runtime = target_named(target)
    rules = [_bind(recipe, index, facts) for index in range(len(recipe.rules))]
    decisions = with_folds([for_target(_decide(site, rules), runtime) for site in facts.sites])
    decisions = with_sums(decisions, runtime)
    decisions = with_branches(with_doubled_scales(decisions, recipe.steps), recipe.steps)
    _refuse_misfits(decisions)
    experts = recipe.calibration.experts if facts.experts else None
    plan = Plan(facts, recipe.name, decisions, target, (), experts)
    plan = replace(plan, warnings=(*_warnings(rules, facts), *warnings_of(plan, runtime)))
    if not plan.quantizers():
        raise UserError(_nothing_quantized(plan))
    return plan


@dataclass(frozen=True, slots=True)
class _BoundRule:
    """A rule compared with the whole model: site name -> slot -> the pattern that selects it."""

    rule: Rule
    origin: str
    patterns: tuple[Pattern, ...]
    specs: dict[Slot, QuantizerSpec]
    reached: dict[str, dict[Slot, Pattern]]


def _bind(recipe: Recipe, index: int, facts: ModelFacts) -> _BoundRule:
    rule, origin = recipe.rules[index], recipe.origin(index)
    patterns = tuple(map(parse_pattern, rule.select))
    reached: dict[str, dict[Slot, Pattern]] = {}
    for pattern in patterns:
        sites = [site for site in facts.sites if pattern.matches(site)]
        if not sites and not rule.is_optional:
            raise UserError(no_match_message(pattern, facts.sites, origin) + _untraced(pattern, facts))
        may_reach_all = isinstance(rule.action, Leave) or all(site.is_apart for site in sites)
        for site in sites:
            slots = pattern.matching_slots(site) if may_reach_all or not site.is_apart else ()
            reached[site.name] = dict.fromkeys(slots, pattern) | reached.get(site.name, {})
    scheme = {} if isinstance(rule.action, Leave) else rule.action
    specs = {slot: recipe.quantizer(slot, wanted) for slot, wanted in scheme.items()}
    bound = _BoundRule(rule, origin, patterns, specs, reached)
    if not rule.is_optional:
        _refuse_absent_slots(bound, [site for site in facts.sites if site.name in reached])
    return bound


def _untraced(pattern: Pattern, facts: ModelFacts) -> str:
    if facts.was_traced or not any(word in pattern.text for word in ("attention", "bmm", "softmax")):
        return ""
    return " (attention calls are only seen in a forward pass, and none was traced)"


def _refuse_absent_slots(bound: _BoundRule, sites: Sequence[SiteFacts]) -> None:
    there = dict.fromkeys(slot for site in sites for slot in bound.reached[site.name])
    for slot in bound.specs:
        if slot not in there:
            way_out = f"what it may give is {', '.join(s.value for s in there)}" if there else _why_nothing(sites)
            if slot in (Slot.KEY_CACHE, Slot.VALUE_CACHE):
                way_out += "; caches are seen where the sample's forward stores keys and values in one (use_cache)"
            raise UserError(
                f"{bound.origin}: none of the {len(sites)} sites that {' or '.join(map(repr, bound.rule.select))} "
                f"matches lets a rule give it {slot.value!r}; {way_out}"
            )


def _why_nothing(sites: Sequence[SiteFacts]) -> str:
    if any(site.is_apart for site in sites):
        return (
            "norms, routers and adapters are only reached by a pattern that matches nothing else, "
            "such as 'operation:norm'"
        )
    obstacle = next((f"{site.name!r}: {site.obstacle}" for site in sites if site.obstacle), "")
    return obstacle or "nothing there takes a quantizer"


@dataclass(slots=True)
class _Draft:
    """What rules have said about one site so far."""

    given: dict[Slot, tuple[QuantizerSpec, str]] = field(default_factory=dict)
    left: dict[Slot, tuple[str, str]] = field(default_factory=dict)

    def give(self, slot: Slot, spec: QuantizerSpec, rule: str) -> None:
        self.left.pop(slot, None)
        self.given[slot] = (spec, rule)

    def leave(self, slot: Slot, why: str, rule: str) -> None:
        self.given.pop(slot, None)
        self.left[slot] = (why, rule)


def _decide(site: SiteFacts, rules: Sequence[_BoundRule]) -> Decision:
    if site.tied_to:
        return Decision(site, {}, why=f"tied to {site.tied_to}")
    draft = _Draft()
    wanted: set[Slot] = set()
    for bound in rules:
        if site.name in bound.reached:
            _apply(bound, site, draft)
            wanted.update(draft.given)
    if site.obstacle and (draft.given or not draft.left):
        return Decision(site, {}, why=site.obstacle)
    scheme = {slot: _fitted(slot, draft.given[slot][0], site) for slot in site.slots if slot in draft.given}
    is_all_left = set(draft.left) == set(site.slots)
    left = {slot: draft.left[slot] for slot in site.slots if slot in draft.left and (slot in wanted or is_all_left)}
    if scheme:
        rule = " + ".join(dict.fromkeys(draft.given[slot][1] for slot in scheme))
        return Decision(site, scheme, rule, _partly_left(left))
    if left:
        why, rule = next(iter(left.values()))
        return Decision(site, {}, rule, why)
    return Decision(site, {}, why=_unselected(site))


def _fitted(slot: Slot, spec: QuantizerSpec, site: SiteFacts) -> QuantizerSpec:
    """In a stack of weights (experts) each matrix has scales of its own."""
    return replace(spec, format=format_for(spec.format, site.weight_shape)) if slot is Slot.WEIGHT else spec


def for_target(decision: Decision, target: Target) -> Decision:
    """The decision as the target runs it.

    Raises:
        UserError: it cannot.
    """
    inputs = [spec for slot, spec in decision.scheme.items() if slot is not Slot.WEIGHT]
    meets_integers = any(isinstance(spec.format.element, IntFormat) for spec in inputs)
    scheme = {}
    for slot, spec in decision.scheme.items():
        problem = target.problem(decision.site, slot, spec.format, is_dynamic=spec.is_dynamic)
        if problem:
            raise UserError(problem)
        fmt = target.format(slot, spec.format, is_dynamic=spec.is_dynamic, meets_integers=meets_integers)
        scheme[slot] = replace(spec, format=fmt)
    scheme |= target.extra(decision.site, scheme)
    problem = target.clash(decision.site, scheme)
    if problem:
        raise UserError(problem)
    return replace(decision, scheme=scheme)


def with_folds(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Decisions in which batch norms that no rule speaks of become part of the quantized layer before them."""
    quantized = {decision.site.name for decision in decisions if decision.scheme}

    def folded(decision: Decision) -> Decision:
        site = decision.site
        if decision.scheme or decision.rule or not (site.folds_into or site.stays):
            return decision
        if site.stays:
            return replace(decision, why=f"norm: stays as it is, {site.stays}")
        if site.folds_into not in quantized:
            return replace(decision, why="norm: stays as it is, for the layer before it is not quantized")
        return replace(decision, why="norm: folded into the layer before it", folded_into=site.folds_into)

    return tuple(map(folded, decisions))


def with_sums(decisions: Sequence[Decision], target: Target) -> tuple[Decision, ...]:
    """Decisions in which residual sums that no rule speaks of get what the target wants of them."""
    apart = {d.site.folds_into for d in decisions if d.site.folds_into and not d.folded_into}  # a norm is between
    known = {d.site.name: d for d in decisions if not d.site.adds}
    waiting = [d for d in decisions if d.site.adds]
    while waiting:
        names = {decision.site.name for decision in waiting}
        ready = [decision for decision in waiting if not names.intersection(decision.site.adds)] or waiting
        for decision in ready:
            given = [known[name].scheme if name in known and name not in apart else {} for name in decision.site.adds]
            known[decision.site.name] = _with_sum(decision, given, target)
        waiting = [decision for decision in waiting if decision.site.name not in known]
    return tuple(known[decision.site.name] for decision in decisions)


def _with_sum(decision: Decision, given: Sequence[Scheme], target: Target) -> Decision:
    site = decision.site
    scheme = {} if decision.scheme or decision.rule or site.obstacle else target.residual(site, given)
    return Decision(site, scheme, f"target {target.name}") if scheme else decision


def _apply(bound: _BoundRule, site: SiteFacts, draft: _Draft) -> None:
    for slot, pattern in bound.reached[site.name].items():
        name = f"{bound.origin} ({pattern.text})"
        if isinstance(bound.rule.action, Leave):
            why = bound.rule.action.why
            draft.leave(slot, f"left by {bound.origin}: {why}" if why else f"left by {name}", name)
        elif slot in bound.specs:
            draft.give(slot, bound.specs[slot], name)


def _partly_left(left: dict[Slot, tuple[str, str]]) -> str:
    return "; ".join(f"{QUANTIZER_NAMES[slot]} {why}" for slot, (why, _) in left.items())


def _unselected(site: SiteFacts) -> str:
    if site.operation == "norm":
        return "norm: not quantized unless a rule names it"
    match site.role:
        case Role.ROUTER:
            return "router: it decides which experts run; not quantized unless a rule names it"
        case Role.ADAPTER:
            return "adapter: kept apart from the layer that it adapts; not quantized unless a rule names it"
        case None:
            pass
        case _:
            assert_never(site.role)
    if not site.slots:
        return "nothing here takes a quantizer"
    return f"no rule selects {site.operation}"


def _misfit(decision: Decision) -> str | None:
    """Why the weight or the input of a site cannot have its format."""
    site, inputs = decision.site, decision.scheme.get(Slot.INPUT)
    if not site.weight_shape:
        return None
    problem = None if decision.weight is None else decision.weight.format.misfit(site.weight_shape)
    if problem is not None or inputs is None or not isinstance(inputs.format.granularity, PerGroup):
        return problem
    if site.operation in ("conv", "conv_transposed"):
        return (
            f"groups of an input run along its last axis, which is not the channels in a {site.operation}; leave it out"
        )
    return inputs.format.misfit((1, site.weight_shape[-1])) if site.operation == "linear" else None


def _refuse_misfits(decisions: Sequence[Decision]) -> None:
    misfits = []
    for decision in decisions:
        problem = _misfit(decision)
        if problem is not None:
            name = decision.site.name
            reason = problem.removesuffix(", or leave it out")
            misfits.append(f"layer {name!r}: {reason}, or leave it out with a rule (--leave {name!r})")
    if misfits:
        more = len(misfits) - _MOST_MISFITS
        rest = [f"and {more} more layers that do not fit; one pattern may leave out many"] if more > 0 else []
        raise UserError("\n".join([*misfits[:_MOST_MISFITS], *rest]))


def _warnings(rules: Sequence[_BoundRule], facts: ModelFacts) -> list[str]:
    """Things that are allowed, but that a user should know."""
    by_name = {site.name: site for site in facts.sites}
    found = []
    for bound in rules:
        if isinstance(bound.rule.action, Leave):
            continue
        what = f"{bound.origin} ({', '.join(bound.rule.select)})"
        if not bound.reached:
            untraced = _untraced(bound.patterns[0], facts)
            found.append(f"{what} matches nothing in this model{untraced}")
        elif all(by_name[name].tied_to for name in bound.reached):
            owners = ", ".join(sorted({by_name[name].tied_to for name in bound.reached}))
            found.append(f"{what} changes nothing: the parameter is decided where it lives, at {owners}")
        elif all(by_name[name].obstacle for name in bound.reached):
            found.append(f"{what} changes nothing: {by_name[min(bound.reached)].obstacle}")
    return found


def _nothing_quantized(plan: Plan) -> str:
    counts = Counter(decision.why for decision in plan.decisions)
    reasons = "; ".join(f"{number} x {why}" for why, number in counts.most_common(5)) or "it has no sites"
    return f"recipe {plan.recipe!r} quantizes nothing in {plan.facts.model!r}: {reasons}"
