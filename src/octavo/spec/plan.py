"""The plan: who gets what, and why. Resolved from a recipe and a model's facts, before any work."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.errors import UserError
from octavo.spec.beside import NOTHING, Beside
from octavo.spec.coverage import CoverageRow, coverage
from octavo.spec.experts import ExpertsPolicy
from octavo.spec.facts import ModelFacts, SiteFacts, Slot
from octavo.spec.facts_json import model_from_dict, model_to_dict, site_from_dict, site_to_dict
from octavo.spec.formats import format_name
from octavo.spec.select import quantizer_name
from octavo.spec.tensor_format import TensorFormat

PLAN_SCHEMA = "octavo.plan/1"
OBSERVERS = ("absmax", "percentile", "mse", "entropy", "unit")


@dataclass(frozen=True, slots=True)
class ObserverSpec:
    """How a static range is found: ``absmax``, ``percentile``, ``mse`` or ``entropy``.

    ``percentile`` is the share of absolute values kept, in per cent; only for that observer.
    """

    name: str = "absmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in OBSERVERS:
            near = difflib.get_close_matches(self.name, OBSERVERS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?  " if near else ""
            raise UserError(f"unknown observer {self.name!r}: {hint}observers are {', '.join(OBSERVERS)}")
        if not 0 < self.percentile <= 100:
            raise UserError(f"percentile {self.percentile:g} is not between 0 and 100: 99.99 keeps all but the largest")

    def __str__(self) -> str:
        return f"percentile {self.percentile:g}" if self.name == "percentile" else self.name


@dataclass(frozen=True, slots=True)
class QuantizerSpec:
    """A storage format and how its range is found: kept apart."""

    format: TensorFormat
    is_dynamic: bool = False
    observer: ObserverSpec = field(default_factory=ObserverSpec)

    def __str__(self) -> str:
        name = format_name(self.format)
        return f"{name} dynamic" if self.is_dynamic else name

    def to_dict(self) -> dict[str, Any]:
        """The quantizer as plain JSON values; ``from_dict`` reads it back."""
        observer = {"name": self.observer.name, "percentile": self.observer.percentile}
        return {"format": self.format.to_dict(), "is_dynamic": self.is_dynamic, "observer": observer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizerSpec:
        """The quantizer that ``to_dict`` wrote."""
        return cls(TensorFormat.from_dict(data["format"]), data["is_dynamic"], ObserverSpec(**data["observer"]))


Scheme = Mapping[Slot, QuantizerSpec]


@dataclass(frozen=True, slots=True)
class Decision:
    """What one site gets.

    Args:
        site: The facts it was decided on.
        scheme: Slot -> quantizer; empty when the site stays as it is.
        rule: Which rule decided, as the user would recognise it; empty when none matched.
        why: Why the site, or a part of it, stays as it is; empty when fully quantized.
        beside: What algorithms leave beside the layer: after a run as it came out, before as far as steps say.
        folded_into: Of a norm the site of the layer whose weight it becomes a part of; empty when it stays.
    """

    site: SiteFacts
    scheme: Scheme
    rule: str = ""
    why: str = ""
    beside: Beside = NOTHING
    folded_into: str = ""

    @property
    def weight(self) -> QuantizerSpec | None:
        """What the weight gets, ``None`` when it stays as it is."""
        return self.scheme.get(Slot.WEIGHT)

    @property
    def is_quantized(self) -> bool:
        """True when at least one quantizer sits here."""
        return bool(self.scheme)

    @property
    def num_parameters(self) -> int:
        """Values in the parameters that live here."""
        return sum(self.site.parameters.values())

    @property
    def weight_bytes_before(self) -> int:
        """Bytes of the weight as it is: its share of the site's parameters."""
        total = self.num_parameters
        return round(self.site.parameter_bytes * self.site.num_weights / total) if total else 0

    @property
    def bytes_after(self) -> int:
        """Bytes of the site's parameters and scales once quantized, and of what algorithms leave beside them."""
        size = self.site.parameter_bytes + self.beside.num_bytes(self.site)
        if self.weight is not None:
            size += self.weight.format.stored_bytes(self.site.weight_shape) - self.weight_bytes_before
        static = [spec for slot, spec in self.scheme.items() if slot is not Slot.WEIGHT and not spec.is_dynamic]
        return size + sum(4 + int(spec.format.zero_point is not None) for spec in static)

    def quantizers(self) -> tuple[tuple[str, QuantizerSpec], ...]:
        """Full quantizer names with what they do."""
        return tuple((quantizer_name(self.site.name, slot), spec) for slot, spec in self.scheme.items())


@dataclass(frozen=True, slots=True)
class AccountRow:
    """Everything that one rule decided, or that one reason kept as it is."""

    rule: str
    why: str
    num_sites: int
    num_parameters: int
    macs: int | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Change:
    """One quantizer that differs between two plans; an empty text stands for none."""

    quantizer: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Every site with its decision, and the account of what is covered.

    ``experts`` says how experts are calibrated; ``None`` where the model has none. ``untied`` names parameters that
    were other names of one, and are their own now.
    """

    facts: ModelFacts
    recipe: str
    decisions: tuple[Decision, ...]
    target: str = ""
    warnings: tuple[str, ...] = ()
    experts: ExpertsPolicy | None = None
    untied: tuple[str, ...] = ()

    @property
    def parameters_covered(self) -> float:
        """Share of all parameters that are weights with a quantizer, 0 to 1."""
        covered = sum(decision.site.num_weights for decision in self.decisions if decision.weight is not None)
        return covered / self.facts.num_parameters if self.facts.num_parameters else 0.0

    @property
    def macs_covered(self) -> float | None:
        """Share of all multiply-adds done with a quantized weight, 0 to 1; ``None`` when no forward pass was traced."""
        if not self.facts.was_traced:
            return None
        total = sum(decision.site.macs or 0 for decision in self.decisions)
        owners = {decision.site.name for decision in self.decisions if decision.weight is not None}
        covered = sum(d.site.macs or 0 for d in self.decisions if d.site.name in owners or d.site.tied_to in owners)
        return covered / total if total else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and persistent buffers as they are."""
        return self.facts.total_bytes

    @property
    def bytes_after(self) -> int:
        """The same once quantized: codes, scales, what algorithms leave beside layers, and what stays as it is.

        After a run these are the bytes of the tensors in its files. Before, scales of inputs are not counted: most are
        folded into the layer before.
        """
        saved = sum(decision.site.parameter_bytes - decision.bytes_after for decision in self.decisions)
        return self.facts.total_bytes - saved

    def quantizers(self) -> tuple[tuple[str, QuantizerSpec], ...]:
        """Full names of all quantizers with what they do, in model order."""
        return tuple(pair for decision in self.decisions for pair in decision.quantizers())

    def fused_weights(self) -> tuple[tuple[str, ...], ...]:
        """Names of sites that read the same tensor and whose weights share the scale of their scales, group by group.

        Engines compute such layers as one (q, k, v; gate, up), with one such scale.
        """
        groups: dict[tuple[frozenset[str], TensorFormat], list[str]] = {}
        for decision in self.decisions:
            site, spec = decision.site, decision.weight
            if spec is not None and spec.format.shares_outer_scale and site.shares_input_with:
                readers = frozenset((site.name, *site.shares_input_with))
                groups.setdefault((readers, spec.format), []).append(site.name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)

    def with_beside(self, found: Mapping[str, Beside]) -> Plan:
        """The plan of a run that is done: site name -> what is beside it now, and nothing beside the others."""
        decisions = (replace(d, beside=found.get(d.site.name, NOTHING)) for d in self.decisions)
        return replace(self, decisions=tuple(decisions))

    def decision(self, site: str) -> Decision:
        """What the site of this name gets.

        Raises:
            UserError: there is no such site; the message names the nearest ones.
        """
        found = next((decision for decision in self.decisions if decision.site.name == site), None)
        if found is None:
            near = difflib.get_close_matches(site, [decision.site.name for decision in self.decisions], n=3)
            raise UserError(f"the plan has no site {site!r}: near names are {', '.join(near) or 'none'}")
        return found

    def account(self) -> tuple[AccountRow, ...]:
        """What each rule covers and each reason keeps, in order of first appearance; the rows add up to the model."""
        groups: dict[tuple[str, str], list[Decision]] = {}
        for decision in self.decisions:
            groups.setdefault((decision.rule, decision.why), []).append(decision)
        return tuple(
            AccountRow(
                rule=rule,
                why=why,
                num_sites=len(members),
                num_parameters=sum(member.num_parameters for member in members),
                macs=sum(member.site.macs or 0 for member in members) if self.facts.was_traced else None,
                bytes_before=sum(member.site.parameter_bytes for member in members),
                bytes_after=sum(member.bytes_after for member in members),
            )
            for (rule, why), members in groups.items()
        )

    def coverage(self) -> tuple[CoverageRow, ...]:
        """Every parameter and multiply-add in exactly one row: quantized, left by rule or by default, not reached."""
        return coverage(self.decisions, was_traced=self.facts.was_traced)

    def diff(self, other: Plan) -> tuple[Change, ...]:
        """Quantizers that ``other`` adds, drops or changes."""
        before, after = dict(self.quantizers()), dict(other.quantizers())
        names = dict.fromkeys((*before, *after))
        return tuple(
            Change(name, _with_observer(before.get(name)), _with_observer(after.get(name)))
            for name in names
            if before.get(name) != after.get(name)
        )

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back."""
        decisions = [
            {
                "site": site_to_dict(decision.site),
                "scheme": {slot.value: spec.to_dict() for slot, spec in decision.scheme.items()},
                "rule": decision.rule,
                "why": decision.why,
                **({"beside": decision.beside.to_dict()} if decision.beside != NOTHING else {}),
                **({"folded_into": decision.folded_into} if decision.folded_into else {}),
            }
            for decision in self.decisions
        ]
        head: dict[str, Any] = {
            "schema": PLAN_SCHEMA,
            "recipe": self.recipe,
            "target": self.target,
            "warnings": list(self.warnings),
        }
        if self.untied:
            head["untied"] = list(self.untied)
        account = [row.to_dict() for row in self.coverage()]
        if self.experts is not None:
            head["calibration"] = self.experts.to_dict()
        body = {"model": model_to_dict(self.facts), "coverage": account, "decisions": decisions}
        return json.dumps({**head, **body}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            UserError: the text is not a plan, or of a schema that this version cannot read.
        """
        try:
            data = json.loads(text)
            if data.get("schema") != PLAN_SCHEMA:
                raise UserError(f"a plan of schema {data.get('schema')!r}: this octavo reads {PLAN_SCHEMA!r}")
            decisions = tuple(_decision_from_dict(entry) for entry in data["decisions"])
            facts = model_from_dict(data["model"], tuple(decision.site for decision in decisions))
            policy = data.get("calibration")
            experts = ExpertsPolicy.of(policy["experts"], policy["expert_tokens"]) if policy else None
            warnings, untied = tuple(data["warnings"]), tuple(data.get("untied", ()))
            return cls(facts, data["recipe"], decisions, data["target"], warnings, experts, untied)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a plan that octavo wrote ({type(error).__name__}: {error})") from error


def _decision_from_dict(data: Mapping[str, Any]) -> Decision:
    scheme = {Slot(slot): QuantizerSpec.from_dict(spec) for slot, spec in data["scheme"].items()}
    beside = Beside.from_dict(data.get("beside", {}))
    folded_into = data.get("folded_into", "")
    return Decision(site_from_dict(data["site"]), scheme, data["rule"], data["why"], beside, folded_into)


def _with_observer(spec: QuantizerSpec | None) -> str:
    if spec is None:
        return ""
    return str(spec) if spec.is_dynamic else f"{spec}, {spec.observer}"
