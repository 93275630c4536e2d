"""Feeds of blocks: how a segment, or one block of a chain, gets its inputs, runs, and hands on what it made."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from octavo.nn.calls import KeptTree, Tree, first_rows

if TYPE_CHECKING:
    from octavo.nn.walk import Walk

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """How a block gets its inputs, runs, and hands on what it made."""

    num_batches: int
    has_successor: bool

    def tokens(self, index: int) -> Tensor | None:
        """``(batch, length)``: which positions of one batch hold no padding; ``None`` where all do, or nobody knows."""
        ...

    def run(self, index: int, *, full: bool = False) -> Tree:
        """The forward on one batch; ``full``: on the inputs of the unquantized path."""
        ...

    def keep(self, index: int, output: Tree, *, full: bool = False) -> None:
        """Hand an output on to what comes next."""
        ...

    def release(self) -> None:
        """The inputs are not needed any more."""
        ...

    def run_sample(self) -> Tree:
        """The forward on a few samples."""
        ...


class SegmentFeed:
    """What runs before a chain, or after the last; the whole model where there is no chain."""

    def __init__(self, walk: Walk, segment: int) -> None:
        self._walk = walk
        self._segment = segment
        self.num_batches = len(walk.batches)
        self.has_successor = segment < len(walk.structure.chains)

    def tokens(self, index: int) -> Tensor | None:
        """See ``Feed.tokens``."""
        return self._walk.tokens[index]

    def run(self, index: int, *, full: bool = False) -> Tree:
        """See ``Feed.run``."""
        with ExitStack() as cleanup:
            if full:
                cleanup.enter_context(self._walk.quantizers_off())
            return self._walk.run_up_to(self._segment, index, full=full)

    def keep(self, index: int, output: Tree, *, full: bool = False) -> None:
        """See ``Feed.keep``."""
        if self.has_successor:
            self._walk.paths[full].entries[self._segment].append(KeptTree.of(output, self._walk.store))

    def release(self) -> None:
        """See ``Feed.release``: the batches are needed by later segments."""

    def run_sample(self) -> Tree:
        """See ``Feed.run_sample``."""
        return self.run(0) if self._walk.structure.chains else self._walk.run_sample()


class MemberFeed:
    """One block of a chain."""

    def __init__(self, walk: Walk, chain: int, block: int) -> None:
        self._walk = walk
        self._chain = chain
        self._block = block
        members = walk.structure.chains[chain].members
        self._module = walk.model.get_submodule(members[block].path)
        self._is_last = block == len(members) - 1
        self.num_batches = len(walk.batches)
        self.has_successor = True
        self._next: dict[bool, list[KeptTree]] = {False: [], True: []}

    def tokens(self, index: int) -> Tensor | None:
        """See ``Feed.tokens``."""
        return self._walk.tokens[index]

    def run(self, index: int, *, full: bool = False) -> Tree:
        """See ``Feed.run``."""
        return self._forward(self._walk.arguments(self._chain, self._block, index, full=full))

    def _forward(self, arguments: Tree) -> Tree:
        copies = tuple(leaf.clone() if _is_float(leaf) else leaf for leaf in arguments.leaves)  # it may write to them
        args, kwargs = Tree(copies, arguments.spec).value()
        return Tree.of(self._module(*args, **kwargs))

    def keep(self, index: int, output: Tree, *, full: bool = False) -> None:
        """See ``Feed.keep``."""
        walk = self._walk
        if self._is_last:
            walk.paths[full].final[self._chain].append(KeptTree.of(output, walk.store))
            return
        carried = tuple(output.leaves[k] for k in walk.structure.chains[self._chain].carried(self._block))
        self._next[full].append(KeptTree.of(Tree.of(carried), walk.store))

    def release(self) -> None:
        """See ``Feed.release``."""
        for full, path in self._walk.paths.items():
            for kept in path.carried:
                kept.drop()
            path.carried = self._next[full]
            if self._is_last:
                for kept in path.entries[self._chain]:
                    kept.drop()
        self._walk.drop_own(self._chain, self._block)

    def run_sample(self) -> Tree:
        """See ``Feed.run_sample``."""
        whole = self._walk.arguments(self._chain, self._block, 0, full=False)
        cut = first_rows(whole)
        if cut is not None:
            try:
                return self._forward(cut)
            except (RuntimeError, ValueError, IndexError) as error:
                logger.debug("one row of a block's input does not run: %s", error)
        return self._forward(whole)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
