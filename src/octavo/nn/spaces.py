"""Spaces: which axes of a model's tensors must be rotated together, and which cannot be rotated at all.

An axis of a tensor lies in a *space*. Adding two tensors puts their axes into one space; a product sums over an axis of
both operands, which is then one space; views, casts and copies keep it. Turning all tensors of a space by one
orthogonal matrix, parameters included, changes nothing that the model computes, unless something on the way looks at
single channels: a nonlinear function, a product with values that differ from channel to channel, the outside world.
Then the space is *nailed*, with the reason.

Where an axis is cut into neighbours (heads), only blocks of that size may be turned, all by the same matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Member:
    """A run of a parameter's axis that lies in a space.

    Args:
        key: The parameter's first name.
        axis: Its axis.
        start: First index along it.
        stop: The index after the last.
    """

    key: str
    axis: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many channels."""
        return self.stop - self.start


@dataclass(eq=False, slots=True)
class Space:
    """See the module. What is said of a space is true of its ``root``; spaces that were joined have one root.

    Args:
        block: Neighbours that may be turned together; an axis is as long as any multiple of it.
        reason: Why it cannot be turned; empty where it can.
        members: Parameters that lie in it.
        norms_in: Paths of norms whose input lies in it.
        norms_out: Paths of norms whose output lies in it.
        is_sum: Activations were added in it: a residual stream.
        is_mixed: A product of two activations gave it: values mixed by probabilities.
        parts: ``(start, stop)`` -> space of that run, where it was cut apart as a packed projection is.
    """

    block: int
    reason: str = ""
    members: set[Member] = field(default_factory=set)
    norms_in: set[str] = field(default_factory=set)
    norms_out: set[str] = field(default_factory=set)
    is_sum: bool = False
    is_mixed: bool = False
    parts: dict[tuple[int, int], Space] = field(default_factory=dict)
    parent: Space | None = None

    @property
    def root(self) -> Space:
        """The space that this one became part of."""
        found = self
        while found.parent is not None:
            found = found.parent
        return found

    def nail(self, reason: str) -> None:
        """It cannot be turned; the first reason stays."""
        root = self.root
        root.reason = root.reason or reason

    def cut(self, block: int) -> None:
        """Only runs of ``block`` neighbours are still neighbours."""
        root = self.root
        root.block = math.gcd(root.block, block)

    def join(self, other: Space) -> Space:
        """One space from now on."""
        one, two = self.root, other.root
        if one is two:
            return one
        if one.parts or two.parts:
            one.reason = one.reason or two.reason or "it is cut into parts, and used as a whole, too"
        one.reason = one.reason or two.reason
        one.block = math.gcd(one.block, two.block)
        one.members |= two.members
        one.norms_in |= two.norms_in
        one.norms_out |= two.norms_out
        one.is_sum |= two.is_sum
        one.is_mixed |= two.is_mixed
        one.parts = {**two.parts, **one.parts}
        two.parent = one
        return one

    def part(self, start: int, stop: int) -> Space:
        """The space of a run of its channels, as long as it is nothing but an output of parameters."""
        root = self.root
        if (start, stop) not in root.parts:
            size = stop - start
            whole = {member.size for member in root.members} == {root.block}
            if not whole or any(a < stop and start < b for a, b in root.parts):
                root.nail("a part of it is used by itself")
            members = {Member(m.key, m.axis, m.start + start, m.start + stop) for m in root.members if whole}
            root.parts[start, stop] = Space(size, root.reason, members)
        return root.parts[start, stop].root
