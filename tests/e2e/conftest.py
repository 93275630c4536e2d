from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from e2e import zoo
from e2e.cases import CASES


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everybody's data, where the commands run."""
    shelf = tmp_path_factory.mktemp("shelf")
    zoo.pairs_of_text(shelf / "pairs.jsonl")
    zoo.texts(shelf / "texts.jsonl")
    zoo.prose(shelf / "prose.txt")
    zoo.captions(shelf / "plates")
    zoo.picture_folders(shelf / "folders")
    (shelf / "tower_of_mine.py").write_text(zoo.MODULE)
    return shelf


@pytest.fixture(scope="session")
def saved(shelf: Path) -> Callable[[str], str]:
    """The model of a case as the command line names it; its directory is written once."""

    def model(name: str) -> str:
        if ":" in name:
            return name
        if not (shelf / name / "config.json").is_file():
            torch.manual_seed(5)
            getattr(zoo, name)(shelf / name)
        return name

    return model


@pytest.fixture
def _on_the_shelf(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)


@pytest.fixture(scope="session")
def finished(shelf: Path, saved: Callable[[str], str]) -> Callable[[str], Path]:
    """Run directory of a case, quantized once."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            case = CASES[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(shelf)
                saved(name)
                done[name] = case.quantize(shelf / "runs" / name.partition(":")[0])
        return done[name]

    return run
