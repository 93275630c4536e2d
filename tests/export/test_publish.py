"""A directory appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from octavo.errors import UserError
from octavo.export import publish
from octavo.export.publish import OLD_PREFIX, PARTIAL_PREFIX, published


def is_ours(directory: Path) -> bool:
    return (directory / "mark").is_file()


def put(out: Path, text: str) -> None:
    with published(out, kind="a test", is_previous=is_ours) as partial:
        (partial / "mark").write_text(text)
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(text)


def fail(out: Path, text: str) -> None:
    with published(out, kind="a test", is_previous=is_ours) as partial:
        (partial / "mark").write_text(text)
        raise RuntimeError("midway")


@pytest.fixture(params=["exchange", "two renames"])
def _each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_exchange", lambda first, second: False)


@pytest.mark.usefixtures("_each_way")
def test_a_new_output_and_its_successor(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for text in ("first", "second"):
        put(out, text)
        assert (out / "inner" / "file").read_text() == text
        assert os.listdir(out.parent) == ["out"]


@pytest.mark.usefixtures("_each_way")
def test_an_error_leaves_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, "old")
    with pytest.raises(RuntimeError, match="midway"):
        fail(out, "new")
    assert (out / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failing_swap_gives_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    put(out, "old")
    rename = Path.rename

    def refuse_partial(self: Path, target: Path) -> Path:
        if self.name.startswith(PARTIAL_PREFIX):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OSError, match="no"):
        put(out, "new")
    assert (out / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", "text")
    assert (tmp_path / "out" / "mark").is_file()


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "mark").is_file()


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    message = (
        r"cannot write a test to .*thesis: the directory holds something else \(chapter.txt\).*choose another name"
    )
    with pytest.raises(UserError, match=message):
        put(tmp_path / "thesis", "text")
    with pytest.raises(UserError, match="it is a file; choose another name or remove it"):
        put(tmp_path / "thesis" / "chapter.txt", "text")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*out: Not a directory|cannot write .*out: File exists"):
        put(tmp_path / "file" / "out", "text")


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{PARTIAL_PREFIX}out-0123abcd"
    other = tmp_path / f"{PARTIAL_PREFIX}out-2-0123abcd"
    for path in (left, other):
        path.mkdir()
        (path / "half").write_text("")
    put(tmp_path / "out", "text")
    assert not left.exists()
    assert other.exists(), "it belongs to another output, out-2"


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    busy = tmp_path / f"{PARTIAL_PREFIX}out-0123abcd"
    busy.mkdir()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    put(tmp_path / "out", "text")
    assert busy.exists()
    os.close(handle)
    put(tmp_path / "out", "text")
    assert not busy.exists()


def test_an_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f"{OLD_PREFIX}out-0123abcd")
    with pytest.raises(RuntimeError, match="midway"):
        fail(tmp_path / "out", "new")
    assert (tmp_path / "out" / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
