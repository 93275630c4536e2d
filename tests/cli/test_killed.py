"""kill -9 during an export: the old output is intact, and nothing half-written bears the final name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.running import fine

pytestmark = [pytest.mark.usefixtures("_on_the_bench"), pytest.mark.slow]

DYING = """
import os, signal, sys
from octavo.export.shards import ShardWriter

original, count = ShardWriter.add, 0

def add(self, name, tensor):
    global count
    count += 1
    if count == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, name, tensor)

ShardWriter.add = add
sys.argv = {argv!r}
from octavo.cli.main import main
main()
"""


@pytest.mark.parametrize("moment", [1, 30])
def test_a_kill_during_an_export_leaves_the_old_one(moment: int, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    words = ("export", "run", "--layout", "modelopt", "--out", out)
    fine(*words, "--quiet")
    before = _files(out)
    _killed(DYING, moment, words)
    assert _files(out) == before
    fine("verify", out, "--run", "run", "--quiet")
    fine(*words, "--quiet")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "what the killed one left is swept away"


def test_a_kill_during_the_first_export_leaves_nothing_under_the_name(run: Path, tmp_path: Path) -> None:
    _killed(DYING, 30, ("export", "run", "--layout", "modelopt", "--out", tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()
    assert all(path.name.startswith(".octavo-partial-") for path in tmp_path.iterdir())


def test_a_kill_during_quantize_leaves_the_old_run(bench: Path, tmp_path: Path) -> None:
    words = ("quantize", "bert", "--recipe", "fp8-dynamic", "--out", tmp_path / "run")
    fine(*words, "--quiet")
    before = _files(tmp_path / "run")
    _killed(DYING, 20, (*words, "--layout", "modelopt"))
    assert _files(tmp_path / "run") == before


DYING_BLOCKS = """
import os, signal, sys
from octavo.calibrate.checkpoint import Checkpoint

original, count = Checkpoint.keep, 0

def keep(self, number, name, state):
    global count
    count += 1
    if count == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, number, name, state)

Checkpoint.keep = keep
sys.argv = {argv!r}
from octavo.cli.main import main
main()
"""
STEPS = """
rules:
  - {select: "operation:linear", scheme: {weight: int4-channel, input: int8-tensor}}
steps: [{awq: {clip: false}}, gptq]
"""


def test_the_same_command_goes_on_where_a_walk_was_killed(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text(STEPS)
    words = ("quantize", "llama", "--recipe", tmp_path / "steps.yaml", "--data", "texts.jsonl", "--samples", 8)
    fine(*words, "--out", tmp_path / "whole", "--quiet")
    _killed(DYING_BLOCKS, 3, (*words, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    kept = tmp_path / ".octavo-blocks-run"
    assert len(list(kept.glob("block-*.safetensors"))) == 2
    assert "2 blocks were finished before" in fine(*words, "--out", tmp_path / "run").message
    assert not kept.exists()
    names = ("quantized.safetensors", "plan.json", "layout.json")
    assert [(tmp_path / "run" / n).read_bytes() for n in names] == [
        (tmp_path / "whole" / n).read_bytes() for n in names
    ]


def _killed(program: str, moment: int, words: tuple[object, ...]) -> None:
    source = program.format(moment=moment, argv=["octavo", *map(str, words)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
