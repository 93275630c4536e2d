"""Names of repeated layers, folded: ``encoder.layers.{0..11}.mlp.fc1``. The result is a pattern that rules accept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

Index = tuple[int, ...]
_PROBLEM = re.compile(r"layer '(?P<name>[^']*)': (?P<reason>.*)", re.DOTALL)


def template(name: str) -> tuple[str, Index]:
    """A name with its numeric components taken out, and these.

    >>> template("encoder.layers.11.mlp.fc1")
    ('encoder.layers.{}.mlp.fc1', (11,))
    """
    parts = name.split(".")
    index = tuple(int(part) for part in parts if _is_number(part))
    return ".".join("{}" if _is_number(part) else part for part in parts), index


def fold_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Few patterns that together match these names and no other, with the names of each; in order of appearance.

    >>> list(fold_names(["h.0.fc", "h.1.fc", "h.2.fc", "h.4.fc", "head"]))
    ['h.{0..2,4}.fc', 'head']
    """
    by_template: dict[str, set[Index]] = {}
    for name in names:
        shape, index = template(name)
        by_template.setdefault(shape, set()).add(index)
    folded = {
        _fill(shape, map(_range_text, ranges)): [_fill(shape, map(str, index)) for index in itertools.product(*ranges)]
        for shape, indices in by_template.items()
        for ranges in _products(indices)
    }
    return _fold_last(folded)


def fold_problems(problems: Sequence[str], most: int = 3) -> list[str]:
    """Sentences ``layer 'NAME': REASON``, those with the same reason as one; others as they are.

    >>> fold_problems(["layer 'h.0.fc': no label", "layer 'h.1.fc': no label", "nothing to write"])
    ["2 layers ('h.{0,1}.fc'): no label", 'nothing to write']
    """
    by_reason: dict[str, list[str]] = {}
    for problem in problems:
        found = _PROBLEM.fullmatch(problem)
        by_reason.setdefault(found["reason"] if found else problem, []).append(found["name"] if found else "")
    return [_one_problem(reason, names, most) for reason, names in by_reason.items()]


def _one_problem(reason: str, names: list[str], most: int) -> str:
    if len(names) == 1:
        return f"layer '{names[0]}': {reason}" if names[0] else reason
    patterns = list(fold_names(names))
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return f"{len(names)} layers ({', '.join(map(repr, patterns[:most]))}{more}): {reason}"


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _fill(shape: str, texts: Iterable[str]) -> str:
    first, *pieces = shape.split("{}")
    return first + "".join(text + piece for text, piece in zip(texts, pieces, strict=True))


def _products(indices: set[Index]) -> list[list[tuple[int, ...]]]:
    """A set of indices as a union of products of ranges: values of the first place with equal rests go together."""
    if indices == {()}:
        return [[]]
    rests: dict[int, set[Index]] = {}
    for first, *rest in sorted(indices):
        rests.setdefault(first, set()).add(tuple(rest))
    together: dict[frozenset[Index], list[int]] = {}
    for first, rest_set in rests.items():
        together.setdefault(frozenset(rest_set), []).append(first)
    return [[tuple(firsts), *rest] for rest_set, firsts in together.items() for rest in _products(set(rest_set))]


def _range_text(values: Sequence[int]) -> str:
    """``{0..5,7}``; a single value as it is."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(_run_text(run) for run in runs) + "}"


def _run_text(run: Sequence[int]) -> str:
    return f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))


def _fold_last(folded: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Patterns that differ only in the last component go together: ``attn.{q,k,v}_proj``."""
    by_parent: dict[tuple[str, str], list[str]] = {}
    for pattern in folded:
        parent, _, last = pattern.rpartition(".")
        stays_alone = "{" in last or not parent
        by_parent.setdefault((parent, last if stays_alone else ""), []).append(pattern)
    return {_together(group): [name for pattern in group for name in folded[pattern]] for group in by_parent.values()}


def _together(patterns: Sequence[str]) -> str:
    if len(patterns) == 1:
        return patterns[0]
    parent = patterns[0].rpartition(".")[0]
    lasts = [pattern.rpartition(".")[2] for pattern in patterns]
    ending = _common_ending(lasts)
    return f"{parent}.{{{','.join(last.removesuffix(ending) for last in lasts)}}}{ending}"


def _common_ending(words: Sequence[str]) -> str:
    """What all words end with, from an underscore on: ``_proj`` of ``q_proj`` and ``k_proj``."""
    _, mark, ending = words[0].rpartition("_")
    suffix = mark + ending
    return suffix if mark and all(word.endswith(suffix) and word != suffix for word in words) else ""
