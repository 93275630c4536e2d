from __future__ import annotations

import sys

import pytest

from octavo.errors import MissingExtra
from octavo.sources import open_data, open_model, read_image
from sources import tiny


@pytest.fixture
def without(monkeypatch):
    """Makes a package look as if it were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def test_a_model_needs_transformers(saved, without):
    directory = saved("bert")
    without("transformers")
    with pytest.raises(MissingExtra, match=r"opening the model in .* needs the package 'transformers': .*octavo\[hf\]"):
        open_model(directory)


def test_a_model_of_the_hub_needs_its_client(without):
    without("huggingface_hub")
    with pytest.raises(MissingExtra, match=r"opening 'a/b' from the Hugging Face hub needs the package"):
        open_model("a/b")


def test_tables_need_datasets(tmp_path, without):
    (tmp_path / "a.csv").write_text("text\na\n")
    without("datasets")
    with pytest.raises(MissingExtra, match="needs the package 'datasets'"):
        open_data(tmp_path / "a.csv")


def test_pictures_need_pillow(tmp_path, without):
    path = tiny.write_image(tmp_path / "a.png", 0)
    without("PIL")
    with pytest.raises(MissingExtra, match="reading pictures needs the package 'pillow'"):
        read_image(path)


def test_texts_and_json_lines_need_nothing(tmp_path, without):
    for package in ("transformers", "datasets", "PIL"):
        without(package)
    assert len(open_data(tiny.json_lines(tmp_path / "a.jsonl", [{"text": "a"}]))) == 1
