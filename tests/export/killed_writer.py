"""A process that writes a run and kills itself at a chosen moment. Run by ``test_kill.py``.

Usage: killed_writer.py OUT MOMENT...  For every moment OUT/<moment>/run is written whole; then a fork that is killed
writes the same name, and another OUT/<moment>/fresh.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from export.handmade import Handmade, small_fp8
from octavo.export import publish
from octavo.export.run import write_run
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.records import RunRecord


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Handmade):
    """Dies after the first layer."""

    def layers(self) -> Iterator[LayerSnapshot]:
        yield self.members[0]
        die()


class DeadlyLate(Handmade):
    """Dies among the tensors that stay as they are."""

    def passthrough(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield self.kept[0]
        die()


def dying_before(module: object, name: str) -> None:
    def instead(*args: object) -> None:
        die()

    setattr(module, name, instead)


def dying_after(module: object, name: str) -> None:
    original: Callable[..., object] = getattr(module, name)

    def instead(*args: object) -> None:
        original(*args)
        die()

    setattr(module, name, instead)


def write(made: Handmade, out: Path, recipe: str) -> None:
    record = RunRecord.of_plan(made.plan)
    write_run(made, made.plan, recipe=recipe, record=record, source_directory=None, out=out)


def killed(moment: str, out: Path) -> None:
    made = small_fp8()
    match moment:
        case "layer":
            made = Deadly(made.members, made.kept, made.aliases, made.decisions)
        case "passthrough":
            made = DeadlyLate(made.members, made.kept, made.aliases, made.decisions)
        case "sync":
            dying_before(publish, "_sync_tree")
        case "swap":
            dying_before(publish, "_swap")
        case "swapped":
            dying_after(publish, "_swap")
    write(made, out, "new")


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for moment in sys.argv[2:]:
        write(small_fp8(), root / moment / "run", "old")
        for name in ("run", "fresh"):
            child = os.fork()
            if not child:
                killed(moment, root / moment / name)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    main()
