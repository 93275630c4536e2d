"""Arguments and results of a module's forward, taken apart into tensors that can wait in a store, and the rest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from octavo.numerics.store import Store

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


@dataclass(frozen=True, slots=True)
class Tree:
    """A nest of tuples, lists and dicts, flattened.

    Args:
        leaves: Tensors, and whatever else is not a container.
        spec: How the leaves hang together.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, value: Any) -> Tree:
        """``value``, taken apart."""
        leaves, spec = tree_flatten(value)
        return cls(tuple(leaves), spec)

    def value(self) -> Any:
        """The nest again; its tensors are the leaves themselves, its objects (caches, say) fresh copies."""
        return tree_unflatten([fresh(leaf) for leaf in self.leaves], self.spec)

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def fresh(leaf: Any) -> Any:
    """``leaf``, or a copy where a forward might write to it."""
    return leaf if isinstance(leaf, (Tensor, *_PLAIN)) else copy.deepcopy(leaf)


@dataclass(slots=True)
class KeptTree:
    """A tree whose tensors are in a store."""

    store: Store
    key: int
    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Tree, store: Store) -> KeptTree:
        """``tree`` without its tensors, which ``store`` holds from now on."""
        key = store.put([t.detach() for t in tree.tensors()])
        rest = tuple(_HOLE if isinstance(leaf, Tensor) else fresh(leaf) for leaf in tree.leaves)
        return cls(store, key, rest, tree.spec)

    def tree(self) -> Tree:
        """The tree again."""
        tensors = iter(self.store.get(self.key))
        return Tree(tuple(next(tensors) if leaf is _HOLE else leaf for leaf in self.leaves), self.spec)

    def drop(self) -> None:
        """Let the store forget it."""
        self.store.drop(self.key)


_HOLE = object()


def first_rows(tree: Tree, count: int = 1) -> Tree | None:
    """``tree`` with the first ``count`` entries of its batch axis only; ``None`` where there is no such axis.

    The batch axis is the first of the first tensor that has more than one.
    """
    batch = next((leaf.shape[0] for leaf in tree.leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), 0)
    if batch <= count:
        return None
    cut = tuple(
        leaf[:count] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else leaf
        for leaf in tree.leaves
    )
    return Tree(cut, tree.spec)


def floating(leaves: Sequence[Any]) -> list[Tensor]:
    """The floating tensors among ``leaves``."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
