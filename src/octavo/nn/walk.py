"""The walk over a model's blocks: who runs when, on what, and what is kept for whom.

A model is segments and chains in turn: segment 0, chain 0, segment 1, chain 1 ... A segment is everything outside the
chains that runs between two of them; to run it the whole model is run, with the blocks of earlier chains replaced by
what the last of them returned, up to the first block of the next chain, whose arguments are the segment's result. So
every layer is computed once for each pass, whatever the model looks like, and inputs of one block at a time are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.nn.blocks import Surroundings, TorchBlock
from octavo.nn.calls import KeptTree, Tree, first_rows
from octavo.nn.experts import ExpertWatch
from octavo.nn.feeds import MemberFeed, SegmentFeed
from octavo.nn.quantizer import Mode, Quantizer
from octavo.nn.structure import (
    Carried,
    Entry,
    Member,
    Own,
    Source,
    Structure,
    Value,
    find_structure,
    replaced_forwards,
)
from octavo.numerics.arrays import tensors_in
from octavo.numerics.statistics import tokens_of
from octavo.numerics.store import Store

logger = logging.getLogger(__name__)


class _Reached(Exception):
    """The forward has come to where it was to stop."""


class _Path:
    """What one path through the model (simulated or unquantized) has left of each chain, batch by batch."""

    def __init__(self, num_chains: int) -> None:
        self.entries: list[list[KeptTree]] = [[] for _ in range(num_chains)]
        self.final: list[list[KeptTree]] = [[] for _ in range(num_chains)]
        self.carried: list[KeptTree] = []


class Walk:
    """``Door.walk`` of a torch model.

    Args:
        model: Prepared, in evaluation mode.
        run: The forward of the model on a batch.
        batches: Each a tree of tensors that ``run`` takes.
        store: Where inputs wait.
        is_quantized: Blocks get what the settled ones before them return.
        keeps_full: The unquantized path is followed beside it.
        fused: Names of layers that engines join, group by group.
        experts: Counts the tokens of experts.
        folds_only: Layers whose input takes a scale only where it can be folded.
        turned: Keys of weights whose inputs a rotation of weights has turned.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Any], Any],
        batches: Iterable[Any],
        store: Store,
        *,
        is_quantized: bool,
        keeps_full: bool,
        fused: Sequence[Sequence[str]] = (),
        experts: ExpertWatch | None = None,
        folds_only: AbstractSet[str] = frozenset(),
        turned: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.run = run
        self.store = store
        self.keeps_full = keeps_full and is_quantized
        self.batches: list[KeptTree] = []
        self.tokens: list[Tensor | None] = []
        for batch in batches:
            self.tokens.append(tokens_of(batch))
            self.batches.append(KeptTree.of(Tree.of(batch), store))
        self.num_batches = len(self.batches)
        self._sample: Tree | None = None
        self.structure = self._find_structure()
        self.paths = {full: _Path(len(self.structure.chains)) for full in (False, True)}
        self._around = Surroundings(
            store, is_quantized, self.keeps_full, fused=fused, experts=experts, folds_only=folds_only, turned=turned
        )
        self._own: dict[tuple[int, int, int], KeptTree] = {}  # chain, block, batch
        self._parts = self._divide()

    def __len__(self) -> int:
        return sum(1 for _, _, quantizers in self._parts if quantizers)

    def __iter__(self) -> Iterator[TorchBlock]:
        for chain, index, quantizers in self._parts:
            feed: SegmentFeed | MemberFeed
            if index is None:
                feed = SegmentFeed(self, chain)
                name, root = self._segment_name(chain), self.model
            else:
                feed = MemberFeed(self, chain, index)
                name = self.structure.chains[chain].members[index].path
                root = self.model.get_submodule(name)
                if index == 0:
                    self._capture_own(chain)
            if quantizers:
                yield TorchBlock(
                    name, model=self.model, root=root, quantizers=quantizers, feed=feed, around=self._around
                )
            elif feed.has_successor:
                self._pass_through(feed)

    def _pass_through(self, feed: SegmentFeed | MemberFeed) -> None:
        """A part without quantizers only hands on."""
        with torch.no_grad():
            for index in range(feed.num_batches):
                for full in (False, True) if self.keeps_full else (False,):
                    feed.keep(index, feed.run(index, full=full), full=full)
        feed.release()

    # Structure

    def _find_structure(self) -> Structure:
        if not self.batches:
            return Structure(())
        with self.quantizers_off():
            for sample in self._samples():
                try:
                    structure = find_structure(self.model, partial(self._run_tree, sample))
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    logger.debug("one row of the first batch does not run: %s", error)
                    continue
                self._sample = sample
                return structure if self._holds(structure, sample) else Structure(())
        return Structure(())

    def _run_tree(self, batch: Tree) -> Any:
        return self.run(batch.value())

    def _samples(self) -> Iterator[Tree]:
        """One row of the first batch where it can be cut, and else all of it."""
        whole = self.batches[0].tree()
        cut = first_rows(whole)
        yield from (tree for tree in (cut, whole) if tree is not None)

    def _holds(self, structure: Structure, sample: Tree) -> bool:
        """Whether the model gives what it gives with each chain replaced by what its last block returned."""
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        hooks = []
        finals: dict[str, Any] = {}
        for chain in structure.chains:
            last = chain.members[-1].path
            module = self.model.get_submodule(last)
            hooks.append(module.register_forward_hook(lambda m, a, out, last=last: finals.setdefault(last, out)))
            for member in chain.members:
                forwards[self.model.get_submodule(member.path)] = lambda *a, last=last, **k: finals[last]
        with torch.no_grad():
            try:
                before = tensors_in(_plain(self.run(sample.value())))
            finally:
                for hook in hooks:
                    hook.remove()
            with replaced_forwards(forwards):
                after = tensors_in(_plain(self.run(sample.value())))
        main = [(a, b) for a, b in zip(before, after, strict=False) if a.is_floating_point()]
        return not structure.chains or (bool(main) and _close(*main[0]))

    def _divide(self) -> list[tuple[int, int | None, list[Quantizer]]]:
        """``(number of the chain, number of the block or None for the segment before, quantizers)`` in order."""
        chains = self.structure.chains
        owner: dict[int, tuple[int, int | None]] = {}
        for c, chain in enumerate(chains):
            for k, member in enumerate(chain.members):
                for module in self.model.get_submodule(member.path).modules():
                    owner.setdefault(id(module), (c, k))
        shares: dict[tuple[int, int | None], list[Quantizer]] = {}
        seen: set[int] = set()
        for path, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, Quantizer) and id(module) not in seen:
                seen.add(id(module))
                part = owner.get(id(module)) or (self._segment_of(path), None)
                shares.setdefault(part, []).append(module)
        parts: list[tuple[int, int | None, list[Quantizer]]] = []
        for c in range(len(chains) + 1):
            parts.append((c, None, shares.get((c, None), [])))
            if c < len(chains):
                parts.extend((c, k, shares.get((c, k), [])) for k in range(len(chains[c].members)))
        return parts

    def _segment_of(self, path: str) -> int:
        """The segment in which the nearest module around ``path`` that was called runs first."""
        while path:
            path = path.rpartition(".")[0]
            if path in self.structure.segment_of and path:
                return self.structure.segment_of[path]
        return len(self.structure.chains)

    def _segment_name(self, index: int) -> str:
        chains = self.structure.chains
        if not chains:
            return "(model)"
        return f"before {chains[index].members[0].path}" if index < len(chains) else "after the blocks"

    @contextmanager
    def quantizers_off(self) -> Iterator[None]:
        """While open, nothing is rounded anywhere."""
        before = [(m, m.mode) for m in self.model.modules() if isinstance(m, Quantizer)]
        for quantizer, _ in before:
            quantizer.mode = Mode.OFF
        try:
            yield
        finally:
            for quantizer, mode in before:
                quantizer.mode = mode

    # Forward passes of parts

    def run_up_to(self, segment: int, index: int, *, full: bool) -> Tree:
        """The model with the chains before ``segment`` replaced: arguments of the next chain, or what it returns."""
        return self._run(segment, self.batches[index].tree(), lambda chain: self._final(chain, index, full))

    def run_sample(self) -> Tree:
        """The whole of a model without chains, on a few rows."""
        assert self._sample is not None, "no sample without data"
        return self._run(0, self._sample, self._no_chain)

    @staticmethod
    def _no_chain(chain: int) -> Any:
        raise AssertionError("a model without chains")

    def _final(self, chain: int, index: int, full: bool) -> Any:
        return self.paths[full].final[chain][index].tree().value()

    def _run(self, segment: int, batch: Tree, final: Callable[[int], Any]) -> Tree:
        chains = self.structure.chains
        caught: list[Tree] = []
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for c, chain in enumerate(chains[:segment]):
            for member in chain.members:
                forwards[self.model.get_submodule(member.path)] = lambda *a, c=c, **k: final(c)
        if segment < len(chains):
            first = self.model.get_submodule(chains[segment].members[0].path)
            forwards[first] = lambda *a, **k: _catch(caught, a, k)
        with replaced_forwards(forwards):
            try:
                return Tree.of(_plain(self.run(batch.value())))
            except _Reached:
                return caught[0]

    def _capture_own(self, number: int) -> None:
        """Tensors that only some blocks of a chain get, by one more pass through it."""
        chain = self.structure.chains[number]
        if not chain.has_own_tensors:
            return
        for index in range(len(self.batches)):
            with ExitStack() as cleanup, torch.no_grad():
                for k, member in enumerate(chain.members):
                    module = self.model.get_submodule(member.path)
                    stop = k == len(chain.members) - 1
                    hook = module.register_forward_pre_hook(
                        self._own_catcher((number, k, index), member, stop=stop), with_kwargs=True
                    )
                    cleanup.callback(hook.remove)
                forwards: dict[nn.Module, Callable[..., Any]] = {
                    self.model.get_submodule(m.path): lambda *a, c=c, i=index, **k: self._final(c, i, False)
                    for c, earlier in enumerate(self.structure.chains[:number])
                    for m in earlier.members
                }
                cleanup.enter_context(replaced_forwards(forwards))
                try:
                    self.run(self.batches[index].tree().value())
                except _Reached:
                    continue

    def _own_catcher(self, key: tuple[int, int, int], member: Member, *, stop: bool) -> Callable[..., None]:
        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = Tree.of((args, kwargs)).leaves
            own = tuple(leaf for leaf, source in zip(leaves, member.sources, strict=True) if isinstance(source, Own))
            self._own[key] = KeptTree.of(Tree.of(own), self.store)
            if stop:
                raise _Reached

        return catch

    def arguments(self, chain: int, block: int, index: int, *, full: bool) -> Tree:
        """What one block of a chain gets on one batch."""
        path = self.paths[full]
        member = self.structure.chains[chain].members[block]
        entry = path.entries[chain][index].tree()
        if block == 0:
            return entry
        outputs = self.structure.chains[chain].carried(block - 1)
        carried = dict(zip(outputs, path.carried[index].tree().leaves, strict=True))
        own = iter(self._own[chain, block, index].tree().leaves if (chain, block, index) in self._own else ())
        leaves = tuple(_leaf(source, carried, entry, own) for source in member.sources)
        return Tree(leaves, member.spec)

    def drop_own(self, chain: int, block: int) -> None:
        """Tensors that only this block got are not needed any more."""
        for key in [key for key in self._own if key[:2] == (chain, block)]:
            self._own.pop(key).drop()


def _leaf(source: Source, carried: dict[int, Any], entry: Tree, own: Iterator[Any]) -> Any:
    match source:
        case Carried(output):
            return carried[output]
        case Entry(index):
            return entry.leaves[index]
        case Own():
            return next(own)
        case Value(value):
            return value


def _catch(caught: list[Tree], args: Any, kwargs: Any) -> Any:
    caught.append(Tree.of((args, kwargs)))
    raise _Reached


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size))


def _plain(output: Any) -> Any:
    """diffusers' outputs are objects; their tensors are in their fields."""
    return vars(output) if type(output).__module__.startswith("diffusers") else output
