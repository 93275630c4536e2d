"""Rules for operations that choose rows, or write to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.nn.space_tags import Follower, Tag, Tags


class Rows(Follower):
    """Indices, and values put into others."""

    def index(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows chosen by tensors of indices."""
        tags, rest = self._behind(args[0], args[1])
        self.note(out, [*([None] * (out.ndim - rest)), *tags[len(tags) - rest :]])

    def _behind(self, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tags, int]:
        """Tags, and how many axes lie behind the last that is indexed; the others are nailed."""
        tags, used = self.tags(tensor), 0
        for entry in indices:
            used += entry.ndim if entry is not None and entry.dtype in (torch.bool, torch.uint8) else 1
        for tag in tags[:used]:
            self.nail_tag(tag, f"an index chooses from it{self.here()}")
        return tags, len(tags) - used

    def index_select(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows chosen by indices."""
        tags = self.tags(args[0])
        axis = args[1] % len(tags)
        self.nail_tag(tags[axis], f"an index chooses from it{self.here()}")
        self.note(out, [None if k == axis else tag for k, tag in enumerate(tags)])

    def index_add(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows added to chosen rows."""
        self._into(args[0], args[3], out, args[1] % args[0].ndim)

    def index_put(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Rows put in the place of chosen rows."""
        tags, rest = self._behind(args[0], args[1])
        value = self.tags(args[2])
        for back in range(1, rest + 1):
            one, two = tags[-back], value[-back] if len(value) >= back else None
            if one is not None and two is not None and args[0].shape[-back] == args[2].shape[-back]:
                tags[-back] = Tag(one.space.join(two.space))
            else:
                self.nail_tag(one or two, f"something that is no part of it is put into it{self.here()}")
                tags[-back] = None
        self.note(out, [None if k < len(tags) - rest else tag for k, tag in enumerate(tags)])

    def copy(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Values written over others."""
        self._into(args[0], args[1], out, -1)

    def _into(self, target: Tensor, value: Tensor, out: Tensor, axis: int) -> None:
        """Joins all axes but one, which counts rows."""
        tags, other = self.tags(target), self.tags(value)
        for back in range(1, len(tags) + 1):
            k = len(tags) - back
            one, two = tags[k], other[-back] if len(other) >= back else None
            if k == axis:
                self.nail_tag(one, f"an index chooses from it{self.here()}")
                self.nail_tag(two, f"an index chooses from it{self.here()}")
            elif one is not None and two is not None and target.shape[k] == value.shape[-back]:
                tags[k] = Tag(one.space.join(two.space))
            else:
                self.nail_tag(one or two, f"something that is no part of it is put into it{self.here()}")
                tags[k] = None
        self.note(out, tags)
