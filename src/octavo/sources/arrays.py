"""Arrays in files, named like a model's inputs, samples on their first axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.arrays import tensor_of
from octavo.sources.samples import DataKind, Dataset, LazySamples

ARRAY_SUFFIXES = (".npz", ".safetensors")


def holds_arrays(directory: Path) -> bool:
    """Whether array files, and no model, lie in ``directory``."""
    names = [path for path in directory.iterdir() if path.suffix in ARRAY_SUFFIXES]
    return bool(names) and not (directory / "config.json").is_file()


def read_arrays(path: Path, name: str) -> Dataset:
    """One ``.npz`` or safetensors file, or a folder of them: every index of the first axis is a sample.

    Raises:
        UserError: unreadable, empty, with Python objects inside, or arrays of unequal length.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in ARRAY_SUFFIXES) if path.is_dir() else [path]
    parts = [_read(file, name) for file in files]
    places = [(part, row) for part in parts for row in range(len(next(iter(part.values()))))]
    if not places:
        raise UserError(f"data '{name}' is empty")

    def sample(index: int) -> Any:
        part, row = places[index]
        return {key: value[row : row + 1] for key, value in part.items()}

    return Dataset(name, DataKind.ARRAYS, LazySamples(len(places), sample))


def _read(file: Path, name: str) -> dict[str, Tensor]:
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as opened:
                arrays = {key: tensor_of(opened[key]) for key in opened.files}
        else:
            arrays = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data '{name}': {file.name} cannot be read: {reason}; octavo reads no pickles") from error
    lengths = {key: len(value) if value.ndim else 0 for key, value in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise UserError(
            f"data '{name}': the arrays of {file.name} need one first axis, the samples: they have {lengths}"
        )
    return arrays
