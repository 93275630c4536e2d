"""Streams of a model: residual streams and the values of attention, as far as they can be turned, and why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from octavo.nn.norm_folds import bias_problem
from octavo.nn.norms import NormKind
from octavo.nn.space_tags import READS, WRITES, SpaceTrace
from octavo.nn.space_trace import trace_spaces
from octavo.nn.spaces import Member, Space
from octavo.nn.ties import names_of

RESIDUAL, HEADS = "residual", "heads"


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """What must be turned by one matrix.

    Args:
        kind: ``residual`` or ``heads``.
        width: Neighbours that may be turned together.
        spaces: Its spaces, each of which is nailed nowhere unless ``reason`` says so.
        norms: Path -> what it is, and the space of its output.
        reason: Why it cannot be turned; empty where it can.
    """

    kind: str
    width: int
    spaces: tuple[Space, ...]
    norms: Mapping[str, tuple[NormKind, Space]]
    reason: str = ""

    @property
    def members(self) -> list[Member]:
        """Every parameter's axis in it, in a stable order."""
        found = {member for space in self.spaces for member in space.members}
        return sorted(found, key=lambda member: (member.key, member.axis, member.start))

    @property
    def keeps_mean(self) -> bool:
        """One of its norms subtracts the mean."""
        return any(kind.keeps_mean for kind, _ in self.norms.values())


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """All streams of a model, and what was seen of it."""

    found: tuple[Stream, ...]
    seen: SpaceTrace

    def of(self, kind: str) -> list[Stream]:
        """Those of one kind."""
        return [stream for stream in self.found if stream.kind == kind]

    def reads(self, member: Member) -> bool:
        """Whether a product sums over it."""
        return any(role == READS for role, _ in self.seen.roles_of(member))


def find_streams(model: nn.Module, run: Callable[[], Any]) -> Streams:
    """Follow ``run``, one forward pass of ``model``."""
    seen = trace_spaces(model, run)
    roots = _roots(seen)
    streams = [stream for spaces in _components(seen, roots) if (stream := _stream(model, seen, spaces)) is not None]
    return Streams(tuple(streams), seen)


def _roots(seen: SpaceTrace) -> list[Space]:
    waiting = [*seen.spaces, *(space for _, one, two in seen.norms.values() for space in (one, two))]
    roots: dict[int, Space] = {}
    while waiting:
        root = waiting.pop(0).root
        if id(root) not in roots:
            roots[id(root)] = root
            for part in root.parts.values():
                if root.reason:
                    part.nail(root.reason)
                waiting.append(part)
            if root.parts:
                root.nail("it is cut into parts")
    return list(roots.values())


def _components(seen: SpaceTrace, roots: Sequence[Space]) -> Iterator[list[Space]]:
    """Spaces that a norm ties to each other."""
    neighbours: dict[int, list[Space]] = {}
    for _, one, two in seen.norms.values():
        neighbours.setdefault(id(one.root), []).append(two.root)
        neighbours.setdefault(id(two.root), []).append(one.root)
    done: set[int] = set()
    for root in roots:
        waiting, found = [root], []
        while waiting:
            space = waiting.pop()
            if id(space) not in done:
                done.add(id(space))
                found.append(space)
                waiting += neighbours.get(id(space), [])
        if found:
            yield found


def _stream(model: nn.Module, seen: SpaceTrace, spaces: list[Space]) -> Stream | None:
    """The stream that these spaces are; ``None`` for what is neither a residual stream nor values of attention."""
    paths = {path for space in spaces for path in space.norms_out}
    norms = {path: (kind, made.root) for path, (kind, _, made) in seen.norms.items() if path in paths}
    if any(space.is_sum and (space.norms_in or not norms) for space in spaces):
        kind = RESIDUAL
    elif any(space.is_mixed for space in spaces) and not norms:
        kind = HEADS
    else:
        return None
    width = math.gcd(*(space.block for space in spaces))
    stream = Stream(kind, width, tuple(spaces), norms)
    nailed = next((space.reason for space in spaces if space.reason), "")
    reason = _norm_that_writes(seen, stream) or nailed or _why_not(model, seen, stream)
    if not _has_both_ends(seen, stream) if kind == HEADS else reason and not norms:
        return None
    return Stream(kind, width, tuple(spaces), norms, reason)


def _has_both_ends(seen: SpaceTrace, stream: Stream) -> bool:
    roles = {role for member in stream.members for role, _ in seen.roles_of(member)}
    return {READS, WRITES} <= roles


def _norm_that_writes(seen: SpaceTrace, stream: Stream) -> str:
    """A norm whose output is added to something, as behind every block of a post-norm model."""
    for path, (kind, made) in stream.norms.items():
        others = [member for member in made.members if _does(seen, member, WRITES) and not _does(seen, member, READS)]
        if (
            kind.has_weight
            and (others or made.is_sum)
            and not any(_does(seen, m, READS) and _does(seen, m, WRITES) for m in made.members)
        ):
            return f"'{path}' writes to it, and no rotation can pass the scales of its channels"
    return ""


def _why_not(model: nn.Module, seen: SpaceTrace, stream: Stream) -> str:
    own = dict(model.named_parameters())
    for member in stream.members:
        if "parametrizations." in member.key or own[member.key].numel() == 0:
            return f"'{member.key}' is no plain weight"
    for path, (kind, made) in stream.norms.items():
        if not kind.has_weight:
            continue
        if len(made.norms_out) > 1 or any(_does(seen, member, WRITES) for member in made.members):
            tied = _tied_reader(model, seen, made)
            if tied:
                return f"'{tied}' is read behind '{path}' and is the table of embeddings, too"
            return f"'{path}' writes to it, and no rotation can pass the scales of its channels"
        if any(own[member.key].ndim < 2 for member in made.members):
            return f"the scales of '{path}' cannot move into what reads it"
        problem = bias_problem(model, kind, path, made)
        if problem:
            return problem
    return ""


def _does(seen: SpaceTrace, member: Member, role: str) -> bool:
    return any(found == role for found, _ in seen.roles_of(member))


def _tied_reader(model: nn.Module, seen: SpaceTrace, space: Space) -> str:
    """A parameter with several names that is both read and written with in ``space``."""
    names = names_of(model)
    both = [m.key for m in space.members if _does(seen, m, READS) and _does(seen, m, WRITES) and len(names[m.key]) > 1]
    return min(both, default="")


def tied_readers(model: nn.Module, streams: Streams) -> list[str]:
    """Names of parameters that only a tie keeps from being turned: what reads them has a name of its own for them."""
    names = names_of(model)
    found = []
    for stream in streams.of(RESIDUAL):
        for member in stream.members:
            roles = streams.seen.roles_of(member)
            if {role for role, _ in roles} == {READS, WRITES} and len(names[member.key]) > 1:
                places = {place for role, place in roles if role == READS}
                found += [name for name in names[member.key][1:] if name.rpartition(".")[0] in places]
    return list(dict.fromkeys(found))
