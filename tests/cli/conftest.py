from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cli.running import fine
from e2e import zoo


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models and data, good and bad, where the commands run."""
    bench = tmp_path_factory.mktemp("bench")
    torch.manual_seed(3)
    for name in ("bert", "vit", "clip", "llama"):
        getattr(zoo, name)(bench / name)
    zoo.pairs_of_text(bench / "pairs.jsonl")
    zoo.texts(bench / "texts.jsonl")
    zoo.prose(bench / "prose.txt")
    zoo.captions(bench / "plates")
    zoo.picture_folders(bench / "folders")
    (bench / "tower_of_mine.py").write_text(zoo.MODULE)
    _bad_ones(bench)
    return bench


def _bad_ones(bench: Path) -> None:
    (bench / "pickled").mkdir()
    shutil.copy(bench / "bert" / "config.json", bench / "pickled")
    (bench / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    (bench / "wordless").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bench / "bert" / name, bench / "wordless")
    (bench / "empty").mkdir()
    (bench / "thesis").mkdir()
    (bench / "thesis" / "chapter.tex").write_text("years of work")
    (bench / "model.onnx").write_bytes(b"never read")
    (bench / "three.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (bench / "odd_tower.py").write_text(
        "import torch\n"
        "import tower_of_mine\n"
        "def build():\n    print('building')\n    return tower_of_mine.build()\n"
        "def wide():\n    return [(torch.randn(4, 6, 9), torch.rand(4, 1, 1))]\n"
        "def named():\n    return [{'sound': torch.randn(4, 5, 9)}]\n"
        "def broken():\n    return [(torch.full((4, 5, 9), float('nan')), torch.rand(4, 1, 1))]\n"
    )


@pytest.fixture
def _on_the_bench(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)


@pytest.fixture(scope="session")
def run(bench: Path) -> Path:
    """A finished run of BERT, with a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bench)
        words = ("--data", "pairs.jsonl", "--task", "retrieval:pairs.jsonl")
        fine("quantize", "bert", "--recipe", "fp8", *words, "--out", "run", "--layout", "modelopt", "--quiet")
    assert json.loads((bench / "run" / "run.json").read_text())["schema"] == "octavo.run/1"
    return bench / "run"
