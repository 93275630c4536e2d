"""Rules: what is selected, and what it gets."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import UserError
from octavo.spec.facts import Slot
from octavo.spec.formats import FORMATS, format_name, tensor_format
from octavo.spec.plan import ObserverSpec
from octavo.spec.select import parse_pattern
from octavo.spec.tensor_format import PerChannel, PerFlatGroup, PerTensor, PerTile, PerToken, TensorFormat


@dataclass(frozen=True, slots=True)
class SlotRule:
    """What a rule asks for one slot: a format, and how its range is found.

    Args:
        format: Storage format.
        is_dynamic: The range is computed per call and not fixed by calibration.
        observer: How a static range is found; ``None``: the recipe's default (weights: absmax).
    """

    format: TensorFormat
    is_dynamic: bool = False
    observer: ObserverSpec | None = None

    def to_yaml_value(self) -> str | dict[str, Any]:
        """The shortest way to write it in a recipe."""
        name = format_name(self.format)
        value: dict[str, Any] = {"format": name if name in FORMATS else self.format.to_dict()}
        if self.is_dynamic and has_static_range(self.format):
            value["dynamic"] = True
        if self.observer is not None:
            value["observer"] = self.observer.name
            if self.observer.name == "percentile":
                value["percentile"] = self.observer.percentile
        return str(name) if value == {"format": name} else value


def slot_rule(
    slot: Slot,
    format: str | TensorFormat,
    *,
    dynamic: bool | None = None,
    observer: ObserverSpec | None = None,
) -> SlotRule:
    """A checked ``SlotRule``; ``dynamic`` may be left to the format.

    Raises:
        UserError: the slot cannot have this format, or the settings contradict each other.
    """
    fmt = tensor_format(format) if isinstance(format, str) else format
    if slot is Slot.WEIGHT:
        return _weight_rule(fmt, dynamic, observer)
    if isinstance(fmt.granularity, PerChannel | PerTile | PerFlatGroup):
        raise UserError(
            f"{slot.value} cannot be {fmt}: an activation has one scale per tensor (static), "
            "or per token or group (dynamic)"
        )
    is_dynamic = dynamic if dynamic is not None else not has_static_range(fmt)
    if not is_dynamic and not has_static_range(fmt):
        raise UserError(
            f"{slot.value} cannot be {fmt} and static: scales {fmt.outermost.granularity} are found per call"
        )
    if is_dynamic and observer is not None:
        raise UserError(f"{slot.value}: a dynamic range is computed per call and has no observer ({observer})")
    return SlotRule(fmt, is_dynamic, observer)


def has_static_range(fmt: TensorFormat) -> bool:
    """Whether one number, found by calibration, can fix the range of a whole activation.

    True with one scale per tensor, be it the scale of the group scales, which are then found per call (NVFP4).
    """
    return isinstance(fmt.outermost.granularity, PerTensor) and _is_uncentred(fmt)


def _is_uncentred(fmt: TensorFormat) -> bool:
    return fmt.offset is None and (fmt.scale is None or _is_uncentred(fmt.scale))


def _weight_rule(fmt: TensorFormat, dynamic: bool | None, observer: ObserverSpec | None) -> SlotRule:
    if dynamic:
        raise UserError("weight: a weight does not change from call to call, so its range is never dynamic")
    if isinstance(fmt.granularity, PerToken):
        raise UserError(f"weight cannot be {fmt}: tokens are a matter of activations; use per channel")
    return SlotRule(fmt, False, observer)


@dataclass(frozen=True, slots=True)
class Leave:
    """The action of a rule that takes quantizers away."""

    why: str = ""


Action = Mapping[Slot, SlotRule] | Leave


@dataclass(frozen=True, slots=True)
class Rule:
    """Patterns, and what becomes of what they select.

    Args:
        select: Patterns; together they select what any of them selects.
        action: Slot -> what it gets, or ``Leave``.
        is_optional: The rule may match nothing; otherwise each of its patterns must match.
        origin: How messages name the rule; empty: its position in the recipe.
    """

    select: tuple[str, ...]
    action: Action
    is_optional: bool = False
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.select:
            raise UserError("a rule selects nothing: give it at least one pattern")
        for text in self.select:
            parse_pattern(text)
        if not self.action and not isinstance(self.action, Leave):
            raise UserError("a rule with an empty scheme does nothing: name a slot and its format, or use leave")

    def to_dict(self) -> dict[str, Any]:
        """The rule as it is written in a recipe."""
        data: dict[str, Any] = {"select": self.select[0] if len(self.select) == 1 else list(self.select)}
        if isinstance(self.action, Leave):
            data["leave"] = self.action.why or True
        else:
            data["scheme"] = {slot.value: wanted.to_yaml_value() for slot, wanted in self.action.items()}
        return data | ({"optional": True} if self.is_optional else {})


def slot_named(key: str) -> Slot:
    """The slot that a recipe calls ``key``.

    Raises:
        UserError: there is none; the message names the nearest and all of them.
    """
    from_key = {slot.value: slot for slot in Slot}
    if key not in from_key:
        raise UserError(f"unknown slot {key!r}: {nearest_of(key, from_key)}slots are {', '.join(from_key)}")
    return from_key[key]


def nearest_of(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?  ``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?  " if near else ""
