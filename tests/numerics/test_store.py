"""What is put into a store comes back, from memory or from disk, and no file is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.numerics.store import Store

TENSORS = (torch.arange(6.0).view(2, 3).T, torch.tensor([True, False]), torch.tensor(3, dtype=torch.int64))


def same(found: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, TENSORS, strict=True))


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_tensors_come_back(budget: int, tmp_path: Path) -> None:
    with Store(budget, tmp_path) as store:
        keys = [store.put(TENSORS) for _ in range(3)]
        assert all(same(store.get(key)) for key in keys)
        assert len(list(tmp_path.rglob("*.safetensors"))) == (0 if budget else 3)
        assert store.held_bytes <= budget
    assert list(tmp_path.iterdir()) == []


def test_what_is_dropped_makes_room(tmp_path: Path) -> None:
    size = sum(t.nbytes for t in TENSORS)
    with Store(size, tmp_path) as store:
        first, second = store.put(TENSORS), store.put(TENSORS)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        store.drop(second)
        assert list(tmp_path.rglob("*.safetensors")) == []
        store.drop(first)
        third = store.put(TENSORS)
        assert store.held_bytes == size
        assert same(store.get(third))
