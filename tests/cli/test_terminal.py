"""What a person sees, and how fast: widths, help, version, interruption, and no torch where none is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.running import fine, octavo, process
from octavo.cli import main as cli
from octavo.spec.version import VERSION

pytestmark = pytest.mark.usefixtures("_on_the_bench")

VIEWS = {
    "plan": ("plan", "clip", "--recipe", "fp8-attention"),
    "plan --all": ("plan", "bert", "--recipe", "fp8-attention", "--all"),
    "quantize": ("quantize", "bert", "--recipe", "fp8-dynamic", "--task", "retrieval:pairs.jsonl"),
    "evaluate": ("evaluate", "run", "--task", "retrieval:pairs.jsonl"),
    "verify": ("verify", "run"),
    "inspect": ("inspect", "run"),
    "inspect --all": ("inspect", "run/modelopt", "--all"),
    "recipes": ("recipes",),
    "formats": ("formats",),
    "--help": ("--help",),
    "quantize --help": ("quantize", "--help"),
}


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_the_terminal_and_nothing_is_cut(view: str, columns: int, run: Path) -> None:
    out = fine(*VIEWS[view], columns=columns).out
    assert out.strip()
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out


def test_a_hint_is_one_line_to_be_copied() -> None:
    words = ("sensitivity", "bert", "--recipe", "fp8-dynamic", "--data", "texts.jsonl", "--top", "4")
    hints = [line for line in fine(*words, columns=60).out.splitlines() if "--leave" in line]
    assert len(hints) == 1
    assert hints[0].count("--leave") >= 2


def test_quiet_is_quiet(run: Path) -> None:
    for view in ("plan", "quantize", "evaluate", "verify", "inspect"):
        outcome = fine(*VIEWS[view], "--quiet")
        assert (outcome.out, outcome.err) == ("", "")


def test_an_evaluation_shows_no_empty_columns(run: Path) -> None:
    quantized = fine("evaluate", "run", "--task", "retrieval:pairs.jsonl").out
    assert "quantized" in quantized
    assert "baseline" not in quantized
    assert "written to" not in quantized
    baseline = fine("evaluate", "bert", "--task", "retrieval:pairs.jsonl").out
    assert "not quantized" in baseline
    assert "change" not in baseline


def test_a_default_number_of_samples_is_no_request(run: Path) -> None:
    assert "asked for" not in fine("verify", "run", "--data", "pairs.jsonl").err
    assert "fewer than the 500 asked for" in fine("verify", "run", "--data", "pairs.jsonl", "--samples", 500).err


def test_data_shows_a_plain_module_to_the_plan() -> None:
    unseen = fine("plan", "tower_of_mine:build", "--recipe", "fp8-attention", "--json").json
    seen = fine("plan", "tower_of_mine:build", "--recipe", "fp8-attention", "--data", "tower_of_mine:signals", "--json")
    assert unseen["plan"]["macs_covered"] is None
    assert any("no sample was traced" in warning for warning in unseen["warnings"])
    assert seen.json["plan"]["macs_covered"] > 0.5
    assert seen.json["warnings"] == []


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("quantize", "-h"), ("plan", "--help")])
def test_help(words: tuple[str, ...]) -> None:
    assert "Usage" in fine(*words).out


def test_every_verb_is_in_the_help() -> None:
    listed = fine("--help").out
    for verb in cli.VERBS:
        assert f" {verb.__name__} " in listed


def test_version() -> None:
    assert fine("--version").out == f"octavo {VERSION}\n"


def test_an_interruption_has_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("octavo.pipeline.plan", interrupted)
    outcome = octavo("plan", "bert", "--recipe", "fp8")
    assert outcome.status == 130
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_an_interrupted_process_ends_with_130(bench: Path) -> None:
    (bench / "slow_tower.py").write_text(
        "import sys, time\ndef build():\n    print('ready', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "octavo.cli.main", "plan", "slow_tower:build", "--recipe", "fp8"]
    started = subprocess.Popen(
        words,
        cwd=bench,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )
    assert started.stderr is not None
    assert started.stderr.readline() == "ready\n"
    time.sleep(0.2)
    os.kill(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "Traceback" not in err


IMPORTED = """
import sys
from octavo.cli.main import main

sys.argv = {argv!r}
try:
    main()
except SystemExit:
    pass
print("SLOW", [name for name in ("torch", "transformers", "datasets") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("quantize", "--help"),
        ("--version",),
        ("recipes",),
        ("inspect", "run/modelopt"),
        ("plan", "bert", "--recipe", "fp9"),
        ("quantize", "bert", "--recipe", "fp9"),
        ("sensitivity", "bert", "--recipe", "fp9"),
        ("evaluate", "bert"),
    ],
    ids=" ".join,
)
def test_these_need_no_torch(words: tuple[str, ...], bench: Path, run: Path) -> None:
    program = IMPORTED.format(argv=["octavo", *words])
    done = subprocess.run([sys.executable, "-c", program], cwd=bench, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "SLOW []"


def test_a_closed_pipe_is_no_accident(bench: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m octavo.cli.main formats | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_status_of_a_users_mistake_in_a_process(bench: Path) -> None:
    done = process("plan", "./nowhere", "--recipe", "fp9", cwd=bench)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("octavo: unknown recipe 'fp9': did you mean 'fp8'?")
    assert "Traceback" not in done.stderr
