"""What a user may have meant by a pattern that matches nothing: patterns near it that match something."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from octavo.spec.facts import SiteFacts
from octavo.spec.select import Pattern, PatternKind, parse_pattern, quantizer_names


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
        way_out = f"layers here are for instance {_alternatives(examples)}; `octavo plan` lists them all"
    return f"pattern {pattern.text!r} ({origin}) matches no layer and no quantizer of this model: {way_out}"


def _alternatives(words: Sequence[str]) -> str:
    quoted = [repr(word) for word in words]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]])) or "none"
