"""The record of a run, and the object that ``--json`` prints. ``docs/json.md`` describes it for its readers.

The same object, with ``layers``, is the run directory's ``run.json``. Numbers that were not measured, or that are not
finite, are ``null``: JSON has no NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from octavo.errors import UserError
from octavo.spec.plan import Plan

RUN_SCHEMA = "octavo.run/1"
RUNS_SCHEMA = "octavo.runs/1"
PHASES = ("load", "plan", "calibrate", "evaluate", "export")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class MetricRecord(_Part):
    """One metric before and after. ``standard_error`` is that of the difference."""

    baseline: float | None = None
    quantized: float | None = None
    standard_error: float | None = None

    @property
    def change(self) -> float | None:
        """Quantized minus baseline, where both are known."""
        return None if self.baseline is None or self.quantized is None else self.quantized - self.baseline


class SensitivityRecord(_Part):
    """What one quantizer alone costs: how much worse ``metric`` becomes, larger is worse."""

    quantizer: str
    metric: str
    cost: float | None
    format: str = ""
    standard_error: float | None = None


class LayerRecord(_Part):
    """One site of the plan: slot -> format, and which rule or reason."""

    name: str
    operation: str
    quantizers: dict[str, str]
    rule: str
    why: str


class CoverageRecord(_Part):
    """One row of the coverage account: a state, its reason, and how much of the model shares it."""

    state: str
    reason: str
    num_parameters: int
    macs: int | None
    num_sites: int
    sites: list[str]


class ExpertsRecord(_Part):
    """Experts of one layer: how many tokens of the calibration data each of them got, and what the policy was."""

    name: str
    policy: str
    tokens: list[int]


class StepRecord(_Part):
    """What one step of a recipe left of a block's error, and how long it took.

    ``error`` is that of the block's output on the first sample: squared error over the square of the unquantized
    output, with weights that no step has rounded yet rounded to nearest, and inputs as they are.
    """

    name: str
    error: float | None = None
    seconds: float = 0.0


class BlockRecord(_Part):
    """One block of a walk.

    ``error`` is that of its output on the first batch, weights and inputs rounded, from the same inputs: squared error
    over the square of the unquantized output. ``plain_error`` is what ``StepRecord`` says, before any step.
    """

    name: str
    error: float | None = None
    plain_error: float | None = None
    steps: list[StepRecord] = []
    seconds: float = 0.0


class _PlanPart(_Part):
    parameters_covered: float | None = Field(default=None, ge=0, le=1)
    macs_covered: float | None = Field(default=None, ge=0, le=1)
    num_quantizers: int = 0
    coverage: list[CoverageRecord] = []


class _BytesPart(_Part):
    before: int | None = None
    after: int | None = None


class _RunObject(_Part):
    """The contract: at least these keys (a later version may add some)."""

    json_schema: str = Field(alias="schema")
    version: str
    model: str
    recipe: str | None
    leave: list[str]
    target: str
    environment: dict[str, str]
    plan: _PlanPart
    bytes: _BytesPart
    metrics: dict[str, dict[str, MetricRecord]]
    sensitivity: list[SensitivityRecord]
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    warnings: list[str]
    output: str | None
    experts: list[ExpertsRecord]
    blocks: list[BlockRecord]
    layers: list[LayerRecord] = []


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a report may want to say about a run.

    Args:
        model: What the user called the model.
        recipe: Name of the recipe, empty where nothing was quantized.
        version: Version of octavo.
        leave: Patterns that the user left out in addition to the recipe.
        target: Where the files will run, empty for anywhere.
        environment: Versions of Python, torch and the like, and the device.
        parameters_covered: Share of all parameters with a quantized weight, 0 to 1; ``None`` without a plan.
        macs_covered: Share of all multiply-adds with a quantized weight, 0 to 1; ``None`` when not traced.
        num_quantizers: How many quantizers the plan has.
        coverage: Every parameter and multiply-add in one of its rows; empty without a plan.
        layers: What each site gets.
        bytes_before: Tensor bytes of the model as it was.
        bytes_after: Tensor bytes in the files, or the plan's estimate where none were written.
        metrics: Task -> metric -> values.
        sensitivity: Quantizers with what each alone costs, worst first.
        seconds: Phase -> seconds; ``PHASES`` are the usual ones.
        peak_memory_bytes: Largest resident memory of the process, ``None`` where the system does not say.
        warnings: What the user should know.
        output: Path that was written, empty for none.
        experts: Tokens that each expert saw while calibrating, layer by layer.
        blocks: Errors of the blocks that steps worked on, and of every step in them, in order.
    """

    model: str
    recipe: str = ""
    version: str = ""
    leave: tuple[str, ...] = ()
    target: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    parameters_covered: float | None = None
    macs_covered: float | None = None
    num_quantizers: int = 0
    coverage: tuple[CoverageRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None
    metrics: Mapping[str, Mapping[str, MetricRecord]] = field(default_factory=dict)
    sensitivity: tuple[SensitivityRecord, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    output: str = ""
    experts: tuple[ExpertsRecord, ...] = ()
    blocks: tuple[BlockRecord, ...] = ()

    @classmethod
    def of_plan(cls, plan: Plan, *, version: str = "", leave: Sequence[str] = ()) -> RunRecord:
        """A record that knows the plan and nothing of its run yet; ``dataclasses.replace`` adds the rest."""
        return cls(
            model=plan.facts.model,
            recipe=plan.recipe,
            version=version,
            leave=tuple(leave),
            target=plan.target,
            parameters_covered=plan.parameters_covered,
            macs_covered=plan.macs_covered,
            num_quantizers=len(plan.quantizers()),
            coverage=tuple(CoverageRecord(**row.to_dict()) for row in plan.coverage()),
            layers=_layers(plan),
            bytes_before=plan.bytes_before,
            bytes_after=plan.bytes_after,
            warnings=(*plan.facts.notes, *plan.warnings),
        )

    def to_json_object(self) -> dict[str, Any]:
        """What ``--json`` prints: plain values, ``null`` for what is unknown or not finite."""
        metrics = {task: {name: value.model_dump() for name, value in of.items()} for task, of in self.metrics.items()}
        covered = {"parameters_covered": self.parameters_covered, "macs_covered": self.macs_covered}
        return {
            "schema": RUN_SCHEMA,
            "version": self.version,
            "model": self.model,
            "recipe": self.recipe or None,
            "leave": list(self.leave),
            "target": self.target,
            "environment": dict(self.environment),
            "plan": {
                **covered,
                "num_quantizers": self.num_quantizers,
                "coverage": [row.model_dump() for row in self.coverage],
            },
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "metrics": _finite(metrics),
            "sensitivity": _finite([row.model_dump() for row in self.sensitivity]),
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": list(self.warnings),
            "output": self.output or None,
            "experts": [layer.model_dump() for layer in self.experts],
            "blocks": _finite([block.model_dump() for block in self.blocks]),
        }

    def to_json(self) -> str:
        """The record as text, layers included: a run directory's ``run.json``."""
        layers = [layer.model_dump() for layer in self.layers]
        return json.dumps({**self.to_json_object(), "layers": layers}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """The record that ``to_json`` wrote.

        Raises:
            UserError: the text is not a record, or of a schema that this version cannot read.
        """
        try:
            return cls.from_json_object(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"not a record that octavo wrote: {error}") from error

    @classmethod
    def from_json_object(cls, data: object) -> RunRecord:
        """The record that ``to_json_object`` describes.

        Raises:
            UserError: the object breaks the contract; the message names the key.
        """
        check_json_object(data)
        run = _RunObject.model_validate(data)
        return cls(
            model=run.model,
            recipe=run.recipe or "",
            version=run.version,
            leave=tuple(run.leave),
            target=run.target,
            environment=run.environment,
            parameters_covered=run.plan.parameters_covered,
            macs_covered=run.plan.macs_covered,
            num_quantizers=run.plan.num_quantizers,
            coverage=tuple(run.plan.coverage),
            layers=tuple(run.layers),
            bytes_before=run.bytes.before,
            bytes_after=run.bytes.after,
            metrics=run.metrics,
            sensitivity=tuple(run.sensitivity),
            seconds=run.seconds,
            peak_memory_bytes=run.peak_memory_bytes,
            warnings=tuple(run.warnings),
            output=run.output or "",
            experts=tuple(run.experts),
            blocks=tuple(run.blocks),
        )


def runs_to_json_object(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    """What ``octavo demo --json`` prints: one object per recipe, with the ``name`` it bears in the table."""
    entries = [{"name": name, **record.to_json_object()} for name, record in runs.items()]
    return {"schema": RUNS_SCHEMA, "runs": entries}


def check_json_object(data: object) -> None:
    """Hold an object against the contract of ``--json``.

    Raises:
        UserError: a key is missing or of the wrong type, or the schema is another; the message names the key.
    """
    found = data.get("schema") if isinstance(data, dict) else None
    if found != RUN_SCHEMA:
        raise UserError(f"a record of schema {found!r}: this octavo reads {RUN_SCHEMA!r}")
    try:
        _RunObject.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"not a run record: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _layers(plan: Plan) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            name=decision.site.name,
            operation=decision.site.operation,
            quantizers={slot.value: str(spec) for slot, spec in decision.scheme.items()},
            rule=decision.rule,
            why=decision.why,
        )
        for decision in plan.decisions
    )


def _finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by ``None``."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(entry) for key, entry in value.items()}
        case list():
            return [_finite(entry) for entry in value]
        case _:
            return value
