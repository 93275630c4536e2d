"""What is known of the tensors of a forward pass that is followed: which space each of their axes lies in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from octavo.nn.norms import NormKind
from octavo.nn.spaces import Member, Space


@dataclass(frozen=True, slots=True)
class Tag:
    """The space of an axis, and the parameter's axis that it is, where the tensor is a parameter or a view of one."""

    space: Space
    member: Member | None = None


Tags = list[Tag | None]
READS, WRITES = "reads", "writes"


@dataclass(slots=True)
class SpaceTrace:
    """What was seen.

    Args:
        spaces: Every space of a parameter; several of them may have one root.
        roles: Parameter's axis -> whether it was summed over, or made channels, and in which module.
        norms: Path of a norm -> what it is, and the space of its input and of its output.
    """

    spaces: list[Space] = field(default_factory=list)
    roles: dict[Member, set[tuple[str, str]]] = field(default_factory=dict)
    norms: dict[str, tuple[NormKind, Space, Space]] = field(default_factory=dict)

    def roles_of(self, member: Member) -> set[tuple[str, str]]:
        """What is done with a run of an axis, by itself or with more of it: ``(role, module)``."""
        return {
            role
            for known, roles in self.roles.items()
            if (known.key, known.axis) == (member.key, member.axis)
            and known.start < member.stop
            and member.start < known.stop
            for role in roles
        }


class Follower:
    """Follows tensors, which are known by identity and held weakly. The rules for operations build on it."""

    def __init__(self) -> None:
        super().__init__()
        self.result = SpaceTrace()
        self.running: list[str] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], Tags]] = {}

    def note(self, tensor: Tensor, tags: Tags) -> None:
        """Remember the tags of a tensor."""
        self._known[id(tensor)] = (weakref.ref(tensor), tags)

    def tags(self, tensor: Tensor) -> Tags:
        """One for each axis."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or len(known[1]) != tensor.ndim:
            return [None] * tensor.ndim
        return list(known[1])

    def nail(self, tensor: Tensor, reason: str) -> None:
        """No axis of ``tensor`` can be turned."""
        for tag in self.tags(tensor):
            if tag is not None:
                tag.space.nail(reason)

    def nail_tag(self, tag: Tag | None, reason: str) -> None:
        """One axis cannot be turned."""
        if tag is not None:
            tag.space.nail(reason)

    def role(self, tag: Tag | None, role: str) -> None:
        """Remember what is done with a parameter's axis."""
        if tag is not None and tag.member is not None:
            self.result.roles.setdefault(tag.member, set()).add((role, self.place))

    @property
    def place(self) -> str:
        """The innermost module that runs."""
        return self.running[-1] if self.running else ""

    def here(self) -> str:
        """The same, for a reason."""
        return f" in '{self.place}'" if self.place else ""

    def written(self, tag: Tag | None) -> Tag | None:
        """The axis of an activation that an axis of a parameter makes."""
        self.role(tag, WRITES)
        return None if tag is None else Tag(tag.space)

    def unknown(self, name: str, args: Any, kwargs: Any) -> None:
        """An operation without a rule."""
        for tensor in tensors_within((args, kwargs)):
            self.nail(tensor, f"'{name.rstrip('_')}'{self.here()} looks at single channels of it")

    def keep(self, args: Any, kwargs: Any, out: Any) -> None:
        """The same axes: casts, copies, a factor for all."""
        if isinstance(out, Tensor) and out is not args[0]:
            self.note(out, self.tags(args[0]))

    def fresh(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Zeros, or memory that is written to later: whatever it meets."""
        self.note(out, [Tag(Space(size)) for size in out.shape])

    def ignore(self, args: Any, kwargs: Any, out: Any) -> None:
        """Values are not looked at."""


def tensors_within(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers."""
    match value:
        case Tensor():
            yield value
        case Mapping():
            for item in value.values():
                yield from tensors_within(item)
        case list() | tuple():
            for item in value:
                yield from tensors_within(item)
