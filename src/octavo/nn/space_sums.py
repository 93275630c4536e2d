"""Rules for operations element by element: sums put tensors into one space, other factors than one for all nail it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from octavo.nn.space_tags import WRITES, Follower, Tag, Tags


class Sums(Follower):
    """Operations element by element."""

    def add(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A sum, with broadcasting."""
        self.sum_of(args[0], args[1], out)

    def sum_of(self, a: Any, b: Any, out: Tensor) -> None:
        """Both lie in one space, axis by axis."""
        both = [value if isinstance(value, Tensor) else None for value in (a, b)]
        tags: Tags = []
        for back in range(out.ndim, 0, -1):
            one, two = (self.tag_from_end(value, back, out.shape[-back]) for value in both)
            if one is None or two is None:
                what = "something that is no part of it is added to it" + self.here()
                self.nail_tag(one or two, what)
                known = one or two
                if known is not None and known.member is None and back == 1:
                    known.space.root.is_sum |= all(value is not None and value.ndim == out.ndim for value in both)
                tags.append(None)
                continue
            space = one.space.join(two.space)
            space.is_sum |= one.member is None and two.member is None and back == 1
            self.role(one, WRITES)
            self.role(two, WRITES)
            tags.append(Tag(space))
        self.note(out, tags)

    def tag_from_end(self, value: Tensor | None, back: int, size: int) -> Tag | None:
        """Of an axis counted from the end, unless it is broadcast."""
        if value is None or value.ndim < back or value.shape[-back] != size:
            return None
        return self.tags(value)[-back]

    def scale(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A product or quotient, element by element, with broadcasting."""
        a, b = args[0], args[1]
        tags: Tags = []
        for back in range(out.ndim, 0, -1):
            found = []
            for value, other in ((a, b), (b, a)):
                tag = self.tag_from_end(value if isinstance(value, Tensor) else None, back, out.shape[-back])
                varies = isinstance(other, Tensor) and other.ndim >= back and other.shape[-back] > 1
                if tag is not None and varies:
                    tag.space.nail(f"it is multiplied channel by channel{self.here()}")
                if tag is not None:
                    found.append(tag)
            tags.append(found[0] if found and out.shape[-back] > 1 else None)
        self.note(out, tags)

    def div(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A quotient: what divides cannot be turned."""
        if isinstance(args[1], Tensor) and args[1].numel() > 1:
            divisor = [tag for tag in self.tags(args[1]) if tag is not None]
            for tag in divisor:
                tag.space.nail(f"something is divided by it{self.here()}")
        if kwargs.get("rounding_mode") is not None:
            self.unknown("div", args, kwargs)
        self.scale(args, kwargs, out)

    def where(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A choice that is the same for all channels."""
        self._masked(args[0], args[1:3])
        self.sum_of(args[1], args[2], out)

    def masked_fill(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Zeros for all channels of some rows; other values only where nobody looks."""
        self._masked(args[1], args[:1])
        if isinstance(args[2], Tensor) or args[2] != 0:
            self.nail(args[0], f"values are put into it{self.here()}")
        self.keep(args, kwargs, out)

    def masked_scatter(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows of another tensor in the place of some rows."""
        self._masked(args[1], (args[0], args[2]))
        one, two = self.tags(args[0])[-1], self.tags(args[2])[-1]
        tags = self.tags(args[0])
        if one is None or two is None or args[0].shape[-1] != args[2].shape[-1]:
            self.nail_tag(one or two, f"something that is no part of it is put into it{self.here()}")
        else:
            tags[-1] = Tag(one.space.join(two.space))
        self.note(out, tags)

    def _masked(self, mask: Tensor, values: Sequence[Any]) -> None:
        """Nail the last axis of ``values`` where a mask differs from channel to channel."""
        varies = mask.ndim and mask.shape[-1] > 1 and mask.stride(-1) != 0
        if varies and mask.ndim and not bool((mask == mask[..., :1]).all()):
            for value in values:
                if isinstance(value, Tensor) and value.ndim:
                    self.nail_tag(self.tags(value)[-1], f"it is masked channel by channel{self.here()}")
