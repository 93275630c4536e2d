"""Recipe files: YAML read by a safe loader, checked field by field, with messages that name file and line."""

from __future__ import annotations

from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from octavo.errors import UserError
from octavo.spec.plan import ObserverSpec
from octavo.spec.rule import Leave, Rule, SlotRule, nearest_of, slot_named, slot_rule
from octavo.spec.steps import Step, parse_step
from octavo.spec.tensor_format import TensorFormat

Location = tuple[int | str, ...]
_MOST_MESSAGES = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SlotPart(_Part):
    """What a slot gets: ``e4m3-tensor``, or these fields. ``format`` is a name or a format written out."""

    format: Any
    dynamic: bool | None = None
    observer: str | None = None
    percentile: float | None = None


class RulePart(_Part):
    """One rule: ``select`` with either ``scheme`` or ``leave``."""

    select: list[str] = Field(min_length=1)
    scheme: dict[str, SlotPart] | None = None
    leave: str | None = None
    optional: bool = False

    @field_validator("select", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("scheme", mode="before")
    @classmethod
    def _names_alone(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {slot: {"format": wanted} if isinstance(wanted, str) else wanted for slot, wanted in value.items()}

    @field_validator("leave", mode="before")
    @classmethod
    def _reason(cls, value: object) -> object:
        if value is False:
            raise ValueError("'leave: false' does nothing: remove the rule, or write the reason for leaving it out")
        return "" if value is True else value


class CalibrationPart(_Part):
    """Defaults of calibration."""

    observer: str = "absmax"
    percentile: float = 99.99
    samples: int = 512
    batch_size: int = 32
    experts: str = "share"
    expert_tokens: int = 32
    inputs: str = "auto"


class RecipePart(_Part):
    """A whole recipe file. ``extends`` names a preset or a file whose rules come first."""

    name: str = ""
    description: str = ""
    aliases: list[str] = []
    extends: str = ""
    rules: list[RulePart] = []
    steps: list[Any] | None = None
    calibration: CalibrationPart | None = None


class RecipeFile:
    """A checked recipe file that still knows its lines."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._root = _compose(text, source)
        self.content = self._validate(_construct(self._root, source))

    def fail(self, at: Location, message: str) -> NoReturn:
        """Raise a ``UserError`` that names the file and the line of ``at``."""
        raise UserError(f"{self.source}, line {self._line(at)}: {message}")

    def rules(self, name: str, *, is_preset: bool) -> tuple[Rule, ...]:
        """The rules of the file, each knowing where it was written."""
        rules = []
        for index, part in enumerate(self.content.rules):
            at = ("rules", index)
            place = "" if is_preset else f" ({self.source}:{self._line(at)})"
            rules.append(self._rule(part, at, f"{name} rule {index + 1}{place}"))
        return tuple(rules)

    def steps(self) -> tuple[Step, ...]:
        """The steps of the file."""
        found = []
        for index, part in enumerate(self.content.steps or ()):
            try:
                found.append(parse_step(part))
            except UserError as error:
                self.fail(("steps", index, *_option_in(part, str(error))), str(error))
        return tuple(found)

    def _rule(self, part: RulePart, at: Location, origin: str) -> Rule:
        if (part.scheme is None) == (part.leave is None):
            both = "both a scheme and leave" if part.scheme else "neither a scheme nor leave"
            self.fail(at, f"the rule has {both}: it needs one of them")
        try:
            action = Leave(part.leave) if part.leave is not None else self._scheme(part, at)
            return Rule(tuple(part.select), action, part.optional, origin)
        except _Placed as placed:
            self.fail(placed.at, str(placed))
        except UserError as error:
            self.fail((*at, "select"), str(error))

    def _scheme(self, part: RulePart, at: Location) -> dict[Any, SlotRule]:
        scheme = {}
        for key, wanted in (part.scheme or {}).items():
            try:
                slot = slot_named(key)
                scheme[slot] = slot_rule(slot, _format(wanted), dynamic=wanted.dynamic, observer=_observer(wanted))
            except UserError as error:
                raise _Placed((*at, "scheme", key), str(error)) from error
        return scheme

    def _validate(self, data: object) -> RecipePart:
        if not isinstance(data, dict):
            self.fail((), "a recipe is a mapping with the fields " + ", ".join(RecipePart.model_fields))
        try:
            return RecipePart.model_validate(data)
        except ValidationError as error:
            lines = [f"{self.source}, line {self._line(e['loc'])}: {_explain(e)}" for e in error.errors()]
            rest = [f"and {len(lines) - _MOST_MESSAGES} more"] if len(lines) > _MOST_MESSAGES else []
            raise UserError("\n".join(lines[:_MOST_MESSAGES] + rest)) from error

    def _line(self, at: Location) -> int:
        """Line of the key or entry nearest to ``at``, counted from 1."""
        node, line = self._root, self._root.start_mark.line
        for step in at:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line
            elif isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
                if found is not None:
                    line, node = found[0].start_mark.line, found[1]
        return line + 1


class _Placed(UserError):
    """A mistake whose place in the file is known."""

    def __init__(self, at: Location, message: str) -> None:
        super().__init__(message)
        self.at = at


def _option_in(part: object, message: str) -> Location:
    """Where in a step its message belongs: at the option that it names, if it names one."""
    if not isinstance(part, dict):
        return ()
    for name, options in part.items():
        for option in options if isinstance(options, dict) else ():
            if f"{option!r}" in message or f": {option}: " in message:
                return (str(name), str(option))
    return ()


def _format(wanted: SlotPart) -> str | TensorFormat:
    match wanted.format:
        case str():
            return wanted.format
        case dict():
            return TensorFormat.from_dict(wanted.format)
        case _:
            raise UserError(f"format {wanted.format!r} is not a name: write for instance e4m3-tensor")


def _observer(wanted: SlotPart) -> ObserverSpec | None:
    if wanted.percentile is not None and wanted.observer != "percentile":
        raise UserError(f"percentile {wanted.percentile:g} belongs to 'observer: percentile', not to {wanted.observer}")
    if wanted.observer is None:
        return None
    return ObserverSpec(wanted.observer) if wanted.percentile is None else ObserverSpec("percentile", wanted.percentile)


def _compose(text: str, source: str) -> yaml.Node:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise UserError(f"{source}: the file is empty; a recipe needs at least 'rules'")
        _refuse_repeated_keys(root, source)
        return root
    except yaml.YAMLError as error:
        raise UserError(_explain_yaml(error, source)) from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply for a recipe") from error


def _construct(root: yaml.Node, source: str) -> object:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise UserError(_explain_yaml(error, source)) from error
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: yaml.Node, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in seen:
                raise UserError(f"{source}, line {line}: {name!r} is already given in line {seen[name]}")
            seen[name] = line
            _refuse_repeated_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_repeated_keys(entry, source)


def _explain_yaml(error: yaml.YAMLError, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{source}: not YAML: {error}"
    problem = error.problem or "not YAML"
    hint = '; a pattern that begins with * must be quoted: "*.fc1"' if "alias" in f"{problem} {error.context}" else ""
    return f"{source}, line {error.problem_mark.line + 1}: not YAML: {problem}{hint}"


def _explain(error: ErrorDetails) -> str:
    at = error["loc"]
    where, known = _fields_at(at[:-1])
    match error["type"]:
        case "extra_forbidden":
            field = str(at[-1])
            return f"unknown field {field!r} in {where}: {nearest_of(field, known)}fields are {', '.join(known)}"
        case "missing":
            return f"{where} has no {str(at[-1])!r}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "too_short":
            return f"{where} has an empty {str(at[-1])!r}"
        case "model_type":
            return f"{'.'.join(map(str, at))} should be a mapping of fields, not {error['input']!r}"
        case _:
            return f"{'.'.join(map(str, at))}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _fields_at(at: Location) -> tuple[str, tuple[str, ...]]:
    """What the part of the file at ``at`` is called, and its fields."""
    match at:
        case ("rules", _):
            return "a rule", tuple(RulePart.model_fields)
        case ("rules", _, "scheme", slot):
            return f"the scheme of slot {slot}", tuple(SlotPart.model_fields)
        case ("calibration", *_):
            return "calibration", tuple(CalibrationPart.model_fields)
        case _:
            return "the recipe", tuple(RecipePart.model_fields)
