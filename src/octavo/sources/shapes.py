"""A batch by its shapes alone: what a run keeps of its sample, so that its model can be traced again without data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UserError

SAMPLE_FILE = "sample.json"
"""In a run directory."""
_PLAIN = (bool, int, float, type(None))


def shapes_of(batch: Any) -> dict[str, Any] | None:
    """``batch`` as plain JSON values, without what its tensors hold; ``None`` where it has texts or other objects."""
    match batch:
        case Tensor():
            return {"shape": list(batch.shape), "dtype": str(batch.dtype).removeprefix("torch.")}
        case Mapping():
            items = {str(key): shapes_of(value) for key, value in batch.items()}
            return None if any(value is None for value in items.values()) else {"dict": items}
        case tuple() | list():
            values = [shapes_of(value) for value in batch]
            return None if any(value is None for value in values) else {type(batch).__name__: values}
        case _ if isinstance(batch, _PLAIN):
            return {"value": batch}
    return None


def stored_sample(directory: Path) -> Any:
    """A batch like the one with which the model of a run was looked at; ``None`` where the run does not say."""
    path = directory / SAMPLE_FILE
    if not path.is_file():
        return None
    try:
        return batch_of(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def batch_of(shapes: Mapping[str, Any]) -> Any:
    """A batch of these shapes: small numbers that are always the same, ones where they are integers.

    Raises:
        KeyError, TypeError, AttributeError: not what ``shapes_of`` gave.
    """
    match shapes:
        case {"shape": list(shape), "dtype": str(name)}:
            dtype = getattr(torch, name)
            if not dtype.is_floating_point:
                return torch.ones(shape, dtype=dtype)
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        case {"dict": dict(items)}:
            return {key: batch_of(value) for key, value in items.items()}
        case {"tuple": list(values)}:
            return tuple(map(batch_of, values))
        case {"list": list(values)}:
            return [batch_of(value) for value in values]
        case _:
            return shapes["value"]
