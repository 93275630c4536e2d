"""Patterns: how a rule says which sites or quantizers it means.

======================  ==========================================================================
written                 means
======================  ==========================================================================
``*.mlp.fc1``           glob on the dotted name, case sensitive; ``*`` crosses dots, ``{0..5}`` and ``{q,k}_proj``
                        are alternatives
``re:layers\\.[0-3]\\..*``  regular expression that matches the whole name
``type:Linear``         glob on the class name of the module or of one of its base classes
``operation:conv*``     glob on the operation: linear, conv, conv_transposed, embedding, attention, norm, other
======================  ==========================================================================

A glob or a regular expression may name a site (``encoder.layers.0.mlp.fc1``) or one of its quantizers
(``*.input_quantizer``, ``*layers.3*weight_quantizer``). ``suggest`` finds what a user may have meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
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

    def matches_quantizer(self, name: str) -> bool:
        """Whether the pattern means the quantizer with this full name."""
        by_name = self.kind in (PatternKind.GLOB, PatternKind.REGEX)
        return by_name and self.regex.fullmatch(name) is not None

    def matching_slots(self, site: SiteFacts) -> tuple[Slot, ...]:
        """Slots of ``site`` that the pattern means: all of them when it means the site, else those it names."""
        if self.matches_site(site):
            return site.slots
        if self.kind in (PatternKind.TYPE, PatternKind.OPERATION):
            return ()
        return tuple(slot for slot in site.slots if any(map(self.matches_quantizer, quantizer_names(site.name, slot))))

    def matches(self, site: SiteFacts) -> bool:
        """Whether the pattern means the site or at least one of its quantizers."""
        return self.matches_site(site) or bool(self.matching_slots(site))


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


def suggest(pattern: Pattern, sites: Sequence[SiteFacts], limit: int = 3) -> tuple[str, ...]:
    """Patterns near ``pattern``, nearest first, each of which matches something in ``sites``."""
    nearest = _nearest(pattern, sites, 4 * limit)
    working = [text for text in nearest if _matches_anything(text, sites)]
    return tuple(dict.fromkeys(working))[:limit]


def _matches_anything(text: str, sites: Sequence[SiteFacts]) -> bool:
    candidate = parse_pattern(text)
    return any(candidate.matches(site) for site in sites)


def _nearest(pattern: Pattern, sites: Sequence[SiteFacts], limit: int) -> list[str]:
    body = pattern.text[len(pattern.kind.value) :]
    match pattern.kind:
        case PatternKind.TYPE:
            types = {name for site in sites for name in (site.type_name, *site.base_types)}
            return [f"type:{near}" for near in _close(body, types, limit)]
        case PatternKind.OPERATION:
            operations = {site.operation for site in sites}
            return [f"operation:{near}" for near in _close(body, operations, limit) or sorted(operations)]
        case PatternKind.REGEX:
            word = max(re.findall(r"\w+", body), key=len, default="")
            return [f"re:{near}" for near in _with_core_replaced(body, word, _all_names(sites), limit)]
        case PatternKind.GLOB:
            return _nearest_globs(body, sites, limit)


def _nearest_globs(glob: str, sites: Sequence[SiteFacts], limit: int) -> list[str]:
    """Near full names; for a glob, its literal core replaced by the nearest run of as many name components."""
    names = _all_names(sites)
    inside = [f"{glob}.*"] if any(name.startswith(f"{glob}.") for name in names) else []
    core = glob.strip("*.")
    if core == glob:
        return inside + _close(glob, names, limit)
    return _with_core_replaced(glob, core, names, limit) + _close(core, names, limit)


def _with_core_replaced(text: str, core: str, names: list[str], limit: int) -> list[str]:
    """``text`` with ``core`` replaced by near runs of as many name components."""
    if not core:
        return []
    width = core.count(".") + 1
    split = [name.split(".") for name in names]
    runs = {".".join(parts[i : i + width]) for parts in split for i in range(len(parts) - width + 1)}
    start = text.index(core)
    return [text[:start] + near + text[start + len(core) :] for near in _close(core, runs, limit)]


def _all_names(sites: Sequence[SiteFacts]) -> list[str]:
    names = [site.name for site in sites if site.name]
    return names + [name for site in sites for slot in site.slots for name in quantizer_names(site.name, slot)]


def _close(word: str, candidates: set[str] | list[str], limit: int) -> list[str]:
    """Nearest candidates; upper and lower case count as near."""
    by_folded: dict[str, str] = {candidate.lower(): candidate for candidate in sorted(candidates)}
    near = difflib.get_close_matches(word.lower(), by_folded, n=limit, cutoff=0.6)
    near = near or difflib.get_close_matches(word.lower(), by_folded, n=limit, cutoff=0.4)
    return [by_folded[folded] for folded in near]


def no_match_message(pattern: Pattern, sites: Sequence[SiteFacts], origin: str) -> str:
    """The whole sentence for a pattern that matches nothing."""
    near = suggest(pattern, sites)
    if near:
        way_out = f"did you mean {_alternatives(near)}?"
    else:
        examples = [site.name for site in sites if site.slots][:3]
        way_out = f"sites here are for instance {_alternatives(examples)}; `octavo plan` lists them all"
    return f"pattern {pattern.text!r} ({origin}) matches no site and no quantizer of this model: {way_out}"


def _alternatives(words: Sequence[str]) -> str:
    quoted = [repr(word) for word in words]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]])) or "none"
