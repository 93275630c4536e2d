"""Where a model repeats: chains of blocks, each of which takes what the one before returned, found from the data flow.

One forward pass on a sample is watched. Siblings of one class that run one after the other are a chain when the same
argument of each comes, as the very same tensor, out of the one before, and everything else that they get is the same
for all of them or was there before the first began. Names and lists do not matter. What is not in a chain belongs to
the segment before, between or after the chains, by the order of execution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from octavo.nn.calls import Tree


@dataclass(frozen=True, slots=True)
class Carried:
    """An argument that the block before returned: its number among what that returned."""

    output: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An argument that the first block of the chain got, too: its number there."""

    index: int


@dataclass(frozen=True, slots=True)
class Own:
    """A tensor that only this block gets (a mask of its own, say); it does not depend on the blocks before."""


@dataclass(frozen=True, slots=True)
class Value:
    """Anything that is no tensor and differs from what the first block got."""

    value: Any


Source = Carried | Entry | Own | Value


@dataclass(frozen=True, slots=True)
class Member:
    """One block of a chain.

    Args:
        path: Of its module.
        sources: Where each leaf of its arguments comes from.
        spec: How the leaves hang together.
    """

    path: str
    sources: tuple[Source, ...]
    spec: Any


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks that pass one tensor (or a few) from each to the next."""

    members: tuple[Member, ...]

    @property
    def has_own_tensors(self) -> bool:
        """Some block gets a tensor that the first did not get."""
        return any(isinstance(source, Own) for member in self.members for source in member.sources)

    def carried(self, index: int) -> tuple[int, ...]:
        """Which outputs of block ``index`` the next one takes; all of them are kept of the last."""
        sources = self.members[index + 1].sources
        return tuple(sorted({source.output for source in sources if isinstance(source, Carried)}))


@dataclass(frozen=True, slots=True)
class Structure:
    """Chains in the order of execution.

    Args:
        chains: The chains; none where nothing repeats.
        segment_of: Path of a module outside of all chains -> how many chains had begun when it was first called.
    """

    chains: tuple[Chain, ...]
    segment_of: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Call:
    """One call of a candidate: its arguments, what it returned, and their versions then."""

    path: str
    started: int
    arguments: Tree
    argument_versions: tuple[int, ...]
    ended: int = -1
    result: Tree | None = None
    result_versions: tuple[int, ...] = ()


def find_structure(model: nn.Module, run: Callable[[], Any]) -> Structure:
    """Watch ``run``, one forward pass of ``model``, and find the outermost chains.

    Args:
        model: In evaluation mode; only modules with quantizers count.
        run: The forward; every call of it must do the same.
    """
    calls, order = _watch(model, run)
    chains = sorted(_outermost(model, "", calls), key=lambda chain: calls[chain.members[0].path][0].started)
    starts = [calls[chain.members[0].path][0].started for chain in chains]
    inside = tuple(f"{member.path}." for chain in chains for member in chain.members)
    segments = {
        path: sum(start < at for start in starts)
        for path, at in order.items()
        if not f"{path}.".startswith(inside or ("\0",))
    }
    return Structure(tuple(chains), segments)


def _versions(tree: Tree) -> tuple[int, ...]:
    return tuple(leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else -1 for leaf in tree.leaves)


def _watch(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, list[_Call]], dict[str, int]]:
    """Calls of every module that has siblings of its class, and when each module was first called."""
    calls: dict[str, list[_Call]] = {}
    order: dict[str, int] = {}
    clock = iter(range(1 << 62))
    candidates = {path for group in _families(model) for path in group}

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        now = next(clock)
        order.setdefault(path, now)
        if path in candidates:
            arguments = Tree.of((args, kwargs))
            calls.setdefault(path, []).append(_Call(path, now, arguments, _versions(arguments)))

    def leave(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if path in candidates:
            call = calls[path][-1]
            call.ended, call.result = next(clock), Tree.of(output)
            call.result_versions = _versions(call.result)

    with ExitStack() as cleanup:
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(partial(enter, path), with_kwargs=True, prepend=True)
            after = module.register_forward_hook(partial(leave, path), with_kwargs=True)
            cleanup.callback(before.remove)
            cleanup.callback(after.remove)
        cleanup.enter_context(torch.no_grad())
        run()
    return calls, order


def _families(model: nn.Module) -> Iterator[list[str]]:
    for path, module in model.named_modules():
        yield from _siblings(path, module)


def _siblings(path: str, module: nn.Module) -> Iterator[list[str]]:
    """Children of one class that are more than single layers."""
    by_class: dict[type, list[str]] = {}
    for name, child in module.named_children():
        if next(child.children(), None) is not None and next(child.parameters(), None) is not None:
            cls = vars(type(child)).get("octavo_original", type(child))
            by_class.setdefault(cls, []).append(f"{path}.{name}".lstrip("."))
    yield from (group for group in by_class.values() if len(group) > 1)


def _outermost(model: nn.Module, path: str, calls: dict[str, list[_Call]]) -> Iterator[Chain]:
    module = model.get_submodule(path)
    taken: set[str] = set()
    for group in _siblings(path, module):
        chain = _chain([calls.get(member, []) for member in group])
        if chain is not None:
            taken.update(group)
            yield chain
    for name, _ in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        if below not in taken:
            yield from _outermost(model, below, calls)


def _chain(calls: list[list[_Call]]) -> Chain | None:
    """The chain that these siblings are; ``None`` when they are none."""
    if any(len(of_one) != 1 or of_one[0].result is None for of_one in calls):
        return None
    ordered = sorted((of_one[0] for of_one in calls), key=lambda call: call.started)
    if any(a.ended > b.started for a, b in pairwise(ordered)):
        return None
    first = ordered[0]
    entry = Member(first.path, tuple(Entry(k) for k in range(len(first.arguments.leaves))), first.arguments.spec)
    members = [entry]
    for before, after in pairwise(ordered):
        sources = tuple(_source(k, before, after, first) for k in range(len(after.arguments.leaves)))
        members.append(Member(after.path, sources, after.arguments.spec))
    places = [{k for k, s in enumerate(m.sources) if isinstance(s, Carried)} for m in members[1:]]
    same = all(member.spec == entry.spec for member in members)
    main = set.intersection(*places) if same else set()
    return Chain(tuple(members)) if any(_is_tensor(first.arguments, k) for k in main) else None


def _is_tensor(tree: Tree, index: int) -> bool:
    return isinstance(tree.leaves[index], Tensor)


def _source(index: int, before: _Call, after: _Call, first: _Call) -> Source:
    leaf, version = after.arguments.leaves[index], after.argument_versions[index]
    assert before.result is not None
    if isinstance(leaf, Tensor):
        for k, (other, then) in enumerate(zip(before.result.leaves, before.result_versions, strict=True)):
            if other is leaf and then == version:
                return Carried(k)
        for k, (other, then) in enumerate(zip(first.arguments.leaves, first.argument_versions, strict=True)):
            if other is leaf and then == version:
                return Entry(k)
        return Own()
    if index < len(first.arguments.leaves) and _is_same(leaf, first.arguments.leaves[index]):
        return Entry(index)
    return Value(leaf)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other))


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While open, these modules compute something else."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
