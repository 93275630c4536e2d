"""What every layout shares: room on the disk, a directory that appears whole, the model's own files."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.errors import UserError
from octavo.export.companions import companion_bytes, copy_companions, say_untied
from octavo.export.publish import published
from octavo.export.shards import MAX_SHARD_BYTES
from octavo.spec.plan import Plan

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SLACK_BYTES = 1 << 20  # headers, indices, plan and record


@contextmanager
def written_checkpoint(
    out: Path,
    plan: Plan,
    *,
    kind: str,
    is_previous: Callable[[Path], bool],
    source_directory: Path | None,
    trust_remote_code: bool,
) -> Iterator[Path]:
    """A directory to fill that already holds the model's own files; it becomes ``out`` at the end of the block.

    Raises:
        UserError: ``out`` must not be replaced, cannot be written, or the disk is too small. Then ``out`` is as before.
    """
    needed = bytes_needed(plan, max_shard_bytes=MAX_SHARD_BYTES)
    needed += companion_bytes(source_directory, with_code=trust_remote_code)
    _check_room(out, needed)
    try:
        with published(out, kind=kind, is_previous=is_previous) as partial:
            if source_directory is not None:
                copy_companions(source_directory, partial, with_code=trust_remote_code)
                if plan.untied:
                    say_untied(partial / "config.json")
            yield partial
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(_no_room(out, needed, f"the disk is full ({error.strerror})")) from error


def bytes_needed(plan: Plan, *, max_shard_bytes: int) -> int:
    """Bytes on the disk while writing: the tensors, and once more the shard that is being closed."""
    return plan.bytes_after + min(plan.bytes_after, max_shard_bytes) + _SLACK_BYTES


def tensor_bytes(directory: Path) -> int:
    """Bytes of all tensors in the safetensors files of ``directory``, headers not counted."""
    return sum(path.stat().st_size - 8 - _header_bytes(path) for path in directory.glob("*.safetensors"))


def write_json(path: Path, data: object) -> None:
    """``data`` as JSON text that ends with a line break."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_room(out: Path, needed: int) -> None:
    if _free_bytes(out) < needed:
        raise UserError(_no_room(out, needed, "there is not enough room on the disk"))


def _no_room(out: Path, needed: int, reason: str) -> str:
    free = _free_bytes(out)  # what was half written is gone by now: this did not suffice
    amount = f"about {_megabytes(needed)} are needed" if needed > free else "more than that is needed"
    return (
        f"cannot write {out}: {reason}; {_megabytes(free)} are free and {amount}. "
        "Nothing under that name was changed: make room or choose another place"
    )


def _free_bytes(out: Path) -> int:
    """Free bytes where ``out`` will be: at its nearest parent that exists."""
    place = out.expanduser().resolve()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(8))[0])
