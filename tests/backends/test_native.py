"""How the compiled loops come to be: once on a machine, whole or not at all, and never at the price of a result."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.backends import native
from octavo.backends.compiled import CompiledBackend
from octavo.backends.simulate import fake_quantize, format_key
from octavo.numerics import qtensor
from octavo.spec.formats import FORMATS

compiler = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
COUNTING = 'echo called >> "$(dirname "$0")/calls"\nexec c++ "$@"'
USE = """
import torch
from octavo.backends.native import LIBRARY
from octavo.backends.simulate import fake_quantize, format_key
from octavo.spec.formats import FORMATS
fake_quantize(torch.ones(4, 32), format_key(FORMATS["int8-tensor"]), None)
print(LIBRARY.get() is not None)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OCTAVO_COMPILE", raising=False)
    return tmp_path / "cache"


def fake_compiler(directory: Path, script: str) -> str:
    path = directory / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def process(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


@compiler
def test_with_a_compiler_every_catalogue_format_is_taken() -> None:
    assert native.LIBRARY.wait()
    for name, fmt in FORMATS.items():
        support = CompiledBackend().supports(torch.ones(4, 256), fmt)
        assert support.ok, f"{name}: {support.reason}"


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo 'x.cpp:1: error: no such thing' >&2; exit 3", "error: no such thing"), ("sleep 60", "took longer than")],
    ids=["fails", "hangs"],
)
def test_a_compiler_that_fails_or_hangs_costs_one_line_in_the_log(
    script: str, words: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    monkeypatch.setattr(native, "TIMEOUT_S", 0.5)
    library = native.Library()
    with caplog.at_level(logging.WARNING):
        assert not library.wait()
        assert not library.wait()
        assert library.get() is None
    assert [words in record.message for record in caplog.records] == [True]
    assert words in library.reason
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("build-*"))


def test_a_machine_without_a_compiler_says_so_once(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    library = native.Library()
    assert not library.wait()
    assert library.get() is None
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


def test_the_first_use_does_not_wait_for_the_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'while [ ! -e "$(dirname "$0")/go" ]; do sleep 0.1; done; exit 1'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    library = native.Library()
    monkeypatch.setattr("octavo.backends.compiled.LIBRARY", library)
    x, fmt = torch.randn(8, 64), FORMATS["e4m3-tensor"]
    assert "background" in CompiledBackend().supports(x, fmt).reason
    assert torch.equal(fake_quantize(x, format_key(fmt), None), qtensor.fake_quantize(x, fmt))
    (tmp_path / "go").touch()
    assert not library.wait()


def test_the_switch_turns_it_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_COMPILE", "off")
    library = native.Library()
    assert library.get() is None
    assert "OCTAVO_COMPILE" in library.reason
    assert not cache.exists()


@compiler
@pytest.mark.slow
def test_many_processes_compile_once_and_later_ones_not_at_all(cache: Path, tmp_path: Path) -> None:
    cxx = fake_compiler(tmp_path, COUNTING)
    environment = {"CXX": cxx, "OCTAVO_CACHE": str(cache), "OCTAVO_COMPILE": "wait"}
    together = [process(**environment) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in together] == ["True"] * 3
    assert process(**environment).communicate()[0].strip() == "True"
    assert (tmp_path / "calls").read_text().splitlines() == ["called"]
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]


@compiler
@pytest.mark.slow
def test_a_library_that_others_could_have_written_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    assert native.Library().wait()
    (built,) = cache.glob("*.so")
    built.chmod(0o666)
    library = native.Library()
    assert library.get() is None
    assert "written by others" in caplog.text


@compiler
@pytest.mark.slow
def test_a_compiler_that_is_careless_about_rounding_is_not_trusted(cache: Path, tmp_path: Path) -> None:
    """In a process of its own: options of the compiler's own make sums associative."""
    environment = {"CXX": fake_compiler(tmp_path, 'exec c++ -ffast-math "$@" -ffast-math'), "OCTAVO_CACHE": str(cache)}
    assert process(**environment, OCTAVO_COMPILE="wait").communicate()[0].strip() == "False"


@compiler
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    assert native.LIBRARY.wait()
    backend, x = CompiledBackend(), torch.randn(400, 1000)
    before = torch.get_num_threads()
    try:
        for name in ("e4m3-tensor", "int8-token", "int8-channel-asymmetric"):
            found = []
            for threads in (1, 4):
                torch.set_num_threads(threads)
                ranges = backend.min_max(x, FORMATS[name].granularity)
                scale = backend.amax(x, FORMATS[name].granularity) / 100
                found.append((*ranges, scale, backend.fake_quantize(x, FORMATS[name], scale, None)))
            assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)
