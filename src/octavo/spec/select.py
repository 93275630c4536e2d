"""Patterns: how a rule says which sites or quantizers it means.

======================  ==========================================================================
written                 means
======================  ==========================================================================
``*.mlp.fc1``           glob on the dotted name, case sensitive; ``*`` crosses dots, ``{0..5}`` and ``{q,k}_proj``
                        are alternatives
``re:layers\\.[0-3]\\..*``  regular expression that matches the whole name
``type:Linear``         glob on the class name of the module or of one of its base classes
``operation:conv*``     glob on the operation: linear, conv, conv_transposed, embedding, recurrent, attention, matmul,
                        add, norm, activation, other
======================  ==========================================================================

A glob or a regular expression may name a site (``encoder.layers.0.mlp.fc1``), one of its quantizers
(``*.input_quantizer``, ``*layers.3*weight_quantizer``) or one of its parameters (``*.fc1.weight``: its quantizer).
``suggest.py`` finds what a user may have meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from octavo.errors import UserError
from octavo.spec.facts import QUANTIZER_NAMES, SiteFacts, Slot

_OTHER_NAMES: dict[Slot, str] = {Slot.SOFTMAX: "p_bmm_quantizer"}
_TOKEN = re.compile(r"\*+|\?|\[!?[^\]]+\]|\{[^{}]*\}|.", re.DOTALL)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_ALTERNATIVES = 10_000


class PatternKind(Enum):
    """What a pattern is compared with; the value is its prefix."""

    GLOB = ""
    REGEX = "re:"
    TYPE = "type:"
    OPERATION = "operation:"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern. ``text`` is what the user wrote."""

    text: str
    kind: PatternKind
    regex: re.Pattern[str]

    def matches_site(self, site: SiteFacts) -> bool:
        """Whether the pattern means the whole site."""
        match self.kind:
            case PatternKind.TYPE:
                return any(self.regex.fullmatch(name) for name in (site.type_name, *site.base_types))
            case PatternKind.OPERATION:
                return self.regex.fullmatch(site.operation) is not None
            case PatternKind.GLOB | PatternKind.REGEX:
                return self.regex.fullmatch(site.name) is not None

    def matches_part(self, name: str) -> bool:
        """Whether the pattern means the quantizer or the parameter with this full name."""
        by_name = self.kind in (PatternKind.GLOB, PatternKind.REGEX)
        return bool(by_name and name and self.regex.fullmatch(name))

    def matching_slots(self, site: SiteFacts) -> tuple[Slot, ...]:
        """Slots of ``site`` that the pattern means: all of them when it means the site, else those it names."""
        if self.matches_site(site):
            return site.slots
        if self.kind in (PatternKind.TYPE, PatternKind.OPERATION):
            return ()
        return tuple(slot for slot in site.slots if any(map(self.matches_part, _names_of_slot(site, slot))))

    def matches(self, site: SiteFacts) -> bool:
        """Whether the pattern means the site, one of its quantizers or one of its parameters."""
        return (
            self.matches_site(site)
            or bool(self.matching_slots(site))
            or any(map(self.matches_part, (*site.parameters, site.weight_name)))
        )


def quantizer_name(site: str, slot: Slot) -> str:
    """Full name of a quantizer.

    >>> quantizer_name("encoder.fc1", Slot.INPUT)
    'encoder.fc1.input_quantizer'
    """
    return f"{site}.{QUANTIZER_NAMES[slot]}" if site else QUANTIZER_NAMES[slot]


def quantizer_names(site: str, slot: Slot) -> tuple[str, ...]:
    """Every name by which a quantizer may be addressed, its own first."""
    own = quantizer_name(site, slot)
    other = _OTHER_NAMES.get(slot)
    return (own,) if other is None else (own, f"{site}.{other}" if site else other)


def _names_of_slot(site: SiteFacts, slot: Slot) -> tuple[str, ...]:
    names = quantizer_names(site.name, slot)
    return (*names, site.weight_name) if slot is Slot.WEIGHT and site.weight_name else names


def parse_pattern(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        UserError: it is empty, of an unknown kind, or not a regular expression; the message gives the position.
    """
    if not text.strip():
        raise UserError("an empty pattern selects nothing: write a name such as 'encoder.layers.0.mlp.fc1', or '*'")
    for kind in (PatternKind.REGEX, PatternKind.TYPE, PatternKind.OPERATION):
        if text.startswith(kind.value):
            body = text[len(kind.value) :]
            expression = body if kind is PatternKind.REGEX else _glob_to_regex(text, body)
            return Pattern(text, kind, _compile(text, expression))
    if ":" in text:
        raise UserError(
            f"pattern {text!r}: unknown kind {text.split(':')[0] + ':'!r}; "
            "kinds are re: (regular expression), type: (class name) and operation:, without any it is a glob"
        )
    return Pattern(text, PatternKind.GLOB, _compile(text, _glob_to_regex(text, text)))


def _compile(text: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression, re.DOTALL)
    except re.error as error:
        place = f" at position {error.pos} of {expression!r}" if error.pos is not None else ""
        raise UserError(
            f"pattern {text!r} is not a valid regular expression: {error.msg}{place}; "
            "without the prefix re: a pattern is a glob, where only * ? [...] and {...} are special"
        ) from error


def _glob_to_regex(text: str, glob: str) -> str:
    return "".join(_token_to_regex(text, token) for token in _TOKEN.findall(glob))


def _token_to_regex(text: str, token: str) -> str:
    if token.startswith("*"):
        return ".*"
    if token == "?":
        return "."
    if len(token) > 2 and token[0] == "[":
        negated = token[1] == "!"
        members = token[1 + negated : -1].replace("\\", "\\\\").replace("^", "\\^").replace("[", "\\[")
        return f"[{'^' if negated else ''}{members}]"
    if len(token) > 1 and token[0] == "{":
        alternatives = [_alternative_to_regex(text, item) for item in token[1:-1].split(",")]
        return f"(?:{'|'.join(alternatives)})"
    return re.escape(token)


def _alternative_to_regex(text: str, item: str) -> str:
    numbers = _RANGE.fullmatch(item.strip())
    if numbers is None:
        return _glob_to_regex(text, item.strip())
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST_ALTERNATIVES:
        raise UserError(f"pattern {text!r}: {{{item}}} is not a range of at most {_MOST_ALTERNATIVES} numbers")
    return "|".join(map(str, range(first, last + 1)))
