"""Safetensors files, read with numpy alone and trusted in nothing: headers may lie.

The format: 8 bytes of length, little endian; a JSON header of that length; the tensors, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from octavo.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.bool_,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    }.items()
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where it lies and what its header says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    path: Path
    start: int

    def read(self) -> np.ndarray:
        """The values, in the stored dtype.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.num_bytes)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) != self.num_bytes:
            raise UserError(f"{self.path}: tensor {self.name!r} is cut short; copy the file again")
        return np.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: not there, not JSON, not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a value of type {type(data).__name__} where an object was expected")
    return data


def open_tensors(directory: Path, stem: str) -> dict[str, StoredTensor]:
    """Every tensor of ``<stem>.safetensors``, or of the shards that ``<stem>.safetensors.index.json`` names.

    Raises:
        UserError: no such files, a shard is missing, the index points elsewhere, or a header lies.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        path = directory / f"{stem}.safetensors"
        if not path.is_file():
            raise UserError(f"{directory} has no {path.name}, and no {index.name} that names its parts")
        return read_header(path)[0]
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map")
    headers = {name: _read_shard(index, name) for name in sorted({_shard_name(index, v) for v in weight_map.values()})}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UserError(f"{index}: tensor {name!r} is not in {shard}")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """Tensors and metadata of one safetensors file.

    Raises:
        UserError: it is not one, or the header and the file do not fit together.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path} is not a safetensors file: its header would take {length} of {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not an object")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _stored_tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    _check_spans(tensors, path, start=8 + length, end=size)
    return tensors, metadata if isinstance(metadata, dict) else {}


def _shard_name(index: Path, name: object) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(f"{index}: {name!r} is not the name of a safetensors file beside the index")
    return name


def _read_shard(index: Path, name: str) -> dict[str, StoredTensor]:
    path = index.parent / name
    if not path.is_file():
        raise UserError(f"{index.parent}: {name} is missing, and {index.name} names it; copy the checkpoint again")
    return read_header(path)[0]


def _stored_tensor(name: str, entry: object, path: Path, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, end)
        ):
            pass
        case _:
            raise UserError(f"{path}: tensor {name!r} has no valid dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has the dtype {dtype!r}, which this version cannot read")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != num_bytes:
        raise UserError(
            f"{path}: tensor {name!r} is {dtype} {tuple(shape)}, {num_bytes} bytes, but {end - start} are set aside"
        )
    return StoredTensor(name, dtype, tuple(shape), num_bytes, path, data_start + start)


def _check_spans(tensors: Mapping[str, StoredTensor], path: Path, *, start: int, end: int) -> None:
    """Tensors must follow each other without gaps or overlaps and end with the file."""
    position = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.num_bytes)):
        if tensor.start != position:
            raise UserError(f"{path}: tensor {tensor.name!r} overlaps its neighbour or leaves a gap before it")
        position += tensor.num_bytes
    if position != end:
        raise UserError(
            f"{path}: the header describes {position} bytes and the file has {end}; it is cut short or damaged"
        )
