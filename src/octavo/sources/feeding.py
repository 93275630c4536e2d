"""Data handed in from Python: any iterable of batches, or a function that runs the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.sources.embeddings import call, to_device

_LIMIT_BYTES = 8 << 30


def as_batches(data: Any, *, num_passes: int = 1) -> Iterable[Any]:
    """Whatever holds batches, as something that can be gone through ``num_passes`` times; feed each with ``feed``.

    Args:
        data: an iterable of batches (a DataLoader, a list, a generator), one tensor or dict as the only batch,
            or a function of the model, which is then the only "batch".
        num_passes: a generator can be gone through once only, so for more its batches are kept in memory.

    Raises:
        UserError: no batch, not data at all, or more batches in a generator than memory should hold (8 GiB).
    """
    match data:
        case str() | Path():
            raise UserError(f"data '{data}' is a name; open it first with octavo.sources.open_data and batches")
        case Tensor() | Mapping():
            return [data]
        case nn.Module():
            raise UserError(f"data is a {type(data).__name__}, a module; batches or a function of the model are needed")
        case tuple() if any(isinstance(item, Tensor) for item in data):
            raise UserError("data is a tuple of tensors; if it is one batch, put it in a list: [(...)]")
    if isinstance(data, Iterable):
        return _one_shot(data, num_passes) if iter(data) is data else _checked(data)
    if callable(data):
        return [data]
    raise UserError(f"data is a {type(data).__name__}; an iterable of batches or a function of the model is needed")


def feed(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on ``batch``, moved to where the model is: ``model(x)``, ``model(*args)`` or ``model(**kwargs)``.

    A batch that is a function is called with the model.

    Raises:
        UserError: a batch of any other type.
    """
    if callable(batch) and not isinstance(batch, (Tensor, Mapping)):
        return batch(model)
    return call(model, to_device(batch, _device(model)))


def few_rows(batch: Any, count: int = 4) -> Any | None:
    """The first ``count`` rows of a large batch; ``None`` where it is small already or its rows cannot be told.

    >>> few_rows({"x": torch.zeros(64, 8), "mask": torch.ones(64)})["mask"].shape
    torch.Size([4])
    """
    match batch:
        case Tensor():
            parts: list[Any] = [batch]
        case Mapping():
            parts = list(batch.values())
        case tuple() | list():
            parts = list(batch)
        case _:
            return None
    tensors = [part for part in parts if part is not None]
    if not all(isinstance(part, Tensor) and part.ndim > 0 for part in tensors):
        return None
    if len({part.shape[0] for part in tensors}) != 1 or tensors[0].shape[0] < 2 * count:
        return None
    match batch:
        case Tensor():
            return batch[:count]
        case Mapping():
            return {name: None if part is None else part[:count] for name, part in batch.items()}
        case _:
            return tuple(None if part is None else part[:count] for part in batch)


def _checked(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, Sized) and len(data) == 0:
        raise UserError("data is empty: no batch to feed the model")
    return data


def _one_shot(data: Iterable[Any], num_passes: int) -> Iterable[Any]:
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise UserError("data is empty: the generator gave no batch (has it been used before?)")
    batches = chain([first], iterator)
    return batches if num_passes == 1 else _keep(batches, num_passes)


def _keep(batches: Iterator[Any], num_passes: int) -> list[Any]:
    kept: list[Any] = []
    size = 0
    for batch in batches:
        size += _num_bytes(batch)
        if size > _LIMIT_BYTES:
            raise UserError(
                f"data is a generator with more than {_LIMIT_BYTES >> 30} GiB of batches, and {num_passes} passes over "
                "them are needed; pass something that can be gone through again: a DataLoader, or a class with __iter__"
            )
        kept.append(batch)
    return kept


def _num_bytes(batch: Any) -> int:
    match batch:
        case Tensor():
            return batch.numel() * batch.element_size()
        case Mapping():
            return sum(map(_num_bytes, batch.values()))
        case tuple() | list():
            return sum(map(_num_bytes, batch))
    return 0


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


Feedable = Callable[[nn.Module], None]
"""A function of the user's own that runs the forward passes."""
