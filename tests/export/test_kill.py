"""A writer that is killed leaves the old output, and nothing under a new name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from export.handmade import small_fp8
from octavo.export.publish import PARTIAL_PREFIX
from octavo.export.run import write_run
from octavo.export.run_files import read_run
from octavo.spec.records import RunRecord

BEFORE_THE_SWAP = ("layer", "passthrough", "sync", "swap")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("killed_writer.py")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    path = f"{SCRIPT.parent.parent}"
    command = [sys.executable, str(SCRIPT), str(root), *BEFORE_THE_SWAP, "swapped"]
    subprocess.run(command, check=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=120)
    return root


@pytest.mark.parametrize("moment", BEFORE_THE_SWAP)
def test_the_old_run_is_intact(killed: Path, moment: str) -> None:
    found = read_run(killed / moment / "run")
    assert found.recipe == "old"
    assert len(list(found.layers())) == 3
    assert len(list(found.passthrough())) == 3


@pytest.mark.parametrize("moment", BEFORE_THE_SWAP)
def test_nothing_stands_under_a_new_name(killed: Path, moment: str) -> None:
    assert not (killed / moment / "fresh").exists()
    others = [path.name for path in (killed / moment).iterdir() if path.name != "run"]
    assert others
    assert all(name.startswith(PARTIAL_PREFIX) for name in others)


def test_after_the_swap_the_new_run_stands(killed: Path) -> None:
    for name in ("run", "fresh"):
        assert read_run(killed / "swapped" / name).recipe == "new"


@pytest.mark.parametrize("moment", [*BEFORE_THE_SWAP, "swapped"])
def test_the_next_write_sweeps_what_is_left(killed: Path, moment: str) -> None:
    made = small_fp8()
    for name in ("run", "fresh"):
        out = killed / moment / name
        write_run(made, made.plan, recipe="next", record=RunRecord.of_plan(made.plan), source_directory=None, out=out)
        assert read_run(out).recipe == "next"
    assert sorted(path.name for path in (killed / moment).iterdir()) == ["fresh", "run"]
