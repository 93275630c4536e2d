"""Safetensors files written as a stream: one tensor in memory, shards of bounded size, the same bytes every time.

The safetensors library wants every tensor at once and orders its metadata by chance. The format itself is one
length (8 bytes, little endian), one JSON header padded with spaces to 8 bytes, then the tensors without gaps.
The header comes first but is known last, so tensors wait in spool files, one per item size: written out from wide
to narrow, every tensor lies at a multiple of its item size, which torch needs to map it without a copy.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9

_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


@dataclass(slots=True)
class _Entry:
    dtype: str
    shape: list[int]
    item_bytes: int
    start: int
    num_bytes: int


@dataclass(slots=True)
class _Shard:
    """Tensors of the shard being filled: what the header will say, and where the bytes wait."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    spools: dict[int, Path] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has put down: the file of every tensor, and the bytes of all tensors without headers."""

    weight_map: Mapping[str, str]
    tensor_bytes: int


class ShardWriter:
    """Takes tensors one by one; ``close`` names the files.

    One shard is ``<stem>.safetensors``; more are ``<stem>-00001-of-0000n.safetensors`` with
    ``<stem>.safetensors.index.json``.

    Args:
        directory: Existing directory to write into.
        stem: How file names begin.
        max_shard_bytes: A shard that would grow past this is closed first; a larger tensor gets one of its own.
        always_index: Write the index for a single shard, too: engines then read no other safetensors file.
        metadata: Texts for the header of every file, beside ``format: pt``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stem: str = "model",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        always_index: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._max_shard_bytes = max_shard_bytes
        self._always_index = always_index
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shard = _Shard()
        self._open = ExitStack()
        self._streams: dict[int, IO[bytes]] = {}
        self._closed: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._tensor_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append ``tensor``; its bytes are on their way to the disk when this returns.

        Raises:
            ValueError: the name was written before, or safetensors has no such dtype.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was written before: two layers claim the same name")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r}: safetensors cannot hold {tensor.dtype}")
        num_bytes = tensor.numel() * tensor.element_size()
        if self._shard.entries and self._shard.num_bytes + num_bytes > self._max_shard_bytes:
            self._close_shard()
        stream = self._spool(tensor.element_size())
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        self._shard.entries[name] = _Entry(dtype, shape, tensor.element_size(), stream.tell(), num_bytes)
        stream.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._shard.num_bytes += num_bytes
        self._names.add(name)
        self._tensor_bytes += num_bytes

    def close(self) -> Written:
        """Finish the last shard, give the files their names, write the index."""
        if self._shard.entries or not self._closed:
            self._close_shard()
        count = len(self._closed)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._closed, 1):
            numbered = f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            final = numbered if count > 1 else f"{self._stem}.safetensors"
            path.rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1 or self._always_index:
            index: dict[str, Any] = {"metadata": {"total_size": self._tensor_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")
        return Written(weight_map, self._tensor_bytes)

    def _spool(self, item_bytes: int) -> IO[bytes]:
        if item_bytes not in self._streams:
            path = self._directory / f".{self._stem}-{item_bytes}.spool"
            self._shard.spools[item_bytes] = path
            self._streams[item_bytes] = self._open.enter_context(path.open("wb"))
        return self._streams[item_bytes]

    def _close_shard(self) -> None:
        self._open.close()
        self._streams.clear()
        path = self._directory / f".{self._stem}-{len(self._closed)}.shard"
        with path.open("wb") as file:
            file.write(_header(self._shard, self._metadata))
            for item_bytes in sorted(self._shard.spools, reverse=True):
                spool = self._shard.spools[item_bytes]
                with spool.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 22)
                spool.unlink()
        self._closed.append((path, list(self._shard.entries)))
        self._shard = _Shard()


def _header(shard: _Shard, metadata: Mapping[str, str]) -> bytes:
    """The length and the padded JSON in front of the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for item_bytes in sorted(shard.spools, reverse=True):
        members = {name: entry for name, entry in shard.entries.items() if entry.item_bytes == item_bytes}
        for name, entry in members.items():
            start = offset + entry.start
            span = [start, start + entry.num_bytes]
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        offset += sum(entry.num_bytes for entry in members.values())
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
