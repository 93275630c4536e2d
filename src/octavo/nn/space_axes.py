"""Rules for operations that only lay axes out in another way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from octavo.nn.space_tags import WRITES, Follower, Tag, Tags
from octavo.nn.spaces import Member


class Axes(Follower):
    """Views, slices, tensors beside each other."""

    def view(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Other axes in the same order."""
        self.note(out, self._regrouped(self.tags(args[0]), tuple(args[0].shape), tuple(out.shape)))

    def _regrouped(self, tags: Tags, before: tuple[int, ...], after: tuple[int, ...]) -> Tags:
        found: Tags = [None] * len(after)
        if not math.prod(before):
            return found
        for ins, outs in _groups(before, after):
            last_in, last_out = (
                next((k for k in reversed(ins) if before[k] > 1), None),
                next((k for k in reversed(outs) if after[k] > 1), None),
            )
            for k in ins:
                if k != last_in:
                    self.nail_tag(tags[k] if before[k] > 1 else None, f"it is laid out along another axis{self.here()}")
            tag = None if last_in is None else tags[last_in]
            if tag is None or last_in is None or last_out is None:
                continue
            one, two = before[last_in], after[last_out]
            if one % two and two % one:
                tag.space.nail(f"it is laid out anew{self.here()}")
                continue
            tag.space.cut(min(one, two)) if one != two else None
            found[last_out] = tag
        return found

    def permute(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes in another order."""
        tags = self.tags(args[0])
        self.note(out, [tags[axis] for axis in args[1]])

    def transpose(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Two axes exchanged."""
        tags = self.tags(args[0])
        one, two = (args[1], args[2]) if len(args) > 2 else (0, len(tags) - 1)
        if len(tags) > 1:
            tags[one], tags[two] = tags[two], tags[one]
        self.note(out, tags)

    def expand(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes of one repeated."""
        tags = self.tags(args[0])
        padded: Tags = [*([None] * (out.ndim - len(tags))), *tags]
        sizes = (1,) * (out.ndim - len(tags)) + tuple(args[0].shape)
        self.note(out, [t if size == now else None for t, size, now in zip(padded, sizes, out.shape, strict=True)])

    def repeat(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Copies behind each other."""
        tags, times = self.tags(args[0]), list(args[1])
        tags = [*([None] * (out.ndim - len(tags))), *tags]
        for tag, count in zip(tags, times, strict=True):
            if count != 1:
                self.nail_tag(tag, f"it is laid out anew{self.here()}")
        self.note(out, [tag if count == 1 else None for tag, count in zip(tags, times, strict=True)])

    def unsqueeze(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """An axis of one more."""
        tags = self.tags(args[0])
        axis = args[1] if args[1] >= 0 else args[1] + out.ndim
        self.note(out, [*tags[:axis], None, *tags[axis:]])

    def squeeze(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Axes of one less."""
        self.view(args, kwargs, out)

    def select(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """One index of an axis."""
        tags = self.tags(args[0])
        axis = args[1] % len(tags)
        self.nail_tag(tags[axis], f"an index chooses from it{self.here()}")
        self.note(out, [tag for k, tag in enumerate(tags) if k != axis])

    def slice(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A run of an axis."""
        axis = (args[1] if len(args) > 1 else 0) % args[0].ndim
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        step = args[4] if len(args) > 4 else 1
        size = args[0].shape[axis]
        self._run(args[0], out, axis, max(0, start + size if start < 0 else start), step)

    def _run(self, tensor: Tensor, out: Tensor, axis: int, start: int, step: int = 1) -> None:
        tags = self.tags(tensor)
        tag = tags[axis]
        if tag is not None and out.shape[axis] != tensor.shape[axis]:
            if step != 1 or tensor.shape[axis] != tag.space.root.block:
                tag.space.nail(f"a part of it is used by itself{self.here()}")
                tags[axis] = None
            else:
                stop, own = start + out.shape[axis], tag.member
                member = own and Member(own.key, own.axis, own.start + start, own.start + stop)
                tags[axis] = Tag(tag.space.root.part(start, stop), member)
        self.note(out, tags)

    def split(self, args: Any, kwargs: Any, out: Any) -> None:
        """All of an axis, in runs."""
        axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
        start = 0
        for part in out:
            self._run(args[0], part, axis, start)
            start += part.shape[axis]

    def unbind(self, args: Any, kwargs: Any, out: Any) -> None:
        """All of an axis, one by one."""
        axis = args[1] if len(args) > 1 else 0
        for part in out:
            self.select((args[0], axis), {}, part)

    def cat(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Tensors behind each other."""
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
        full = [tensor for tensor in args[0] if tensor.ndim == out.ndim]
        self._joined([self.tags(tensor) for tensor in full], out, axis)

    def stack(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Tensors along a new axis."""
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
        tags = [self.tags(tensor) for tensor in args[0]]
        self._joined([[*own[:axis], None, *own[axis:]] for own in tags], out, axis)

    def _joined(self, tags: list[Tags], out: Tensor, axis: int) -> None:
        found: Tags = []
        for k in range(out.ndim):
            here = [own[k] for own in tags]
            known = [tag for tag in here if tag is not None]
            if k == axis or len(known) < len(here):
                for tag in known:
                    tag.space.nail(f"it is put beside something else{self.here()}")
                found.append(None)
                continue
            for tag in known:
                self.role(tag, WRITES)
                tag.space.join(known[0].space)
            found.append(Tag(known[0].space))
        self.note(out, found)

    def reduce(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """A sum or mean over axes."""
        tags = self.tags(args[0])
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        axes = range(len(tags)) if given in (None, []) else [axis % len(tags) for axis in given]
        for axis in axes:
            self.nail_tag(tags[axis], f"it is summed up{self.here()}")
        keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        rest = [None if k in axes else tag for k, tag in enumerate(tags) if keeps or k not in axes]
        self.note(out, rest)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest groups of axes of both shapes that hold the same number of values, which is not 0.

    >>> list(_groups((2, 12), (2, 3, 4)))
    [([0], [0]), ([1], [1, 2])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        first, second, ins, outs = i, j, 1, 1
        while True:
            if i < len(before) and (ins < outs or i == first):
                ins, i = ins * before[i], i + 1
            elif j < len(after):
                outs, j = outs * after[j], j + 1
            if ins == outs and (j > second or j == len(after)):
                break
        yield list(range(first, i)), list(range(second, j))
