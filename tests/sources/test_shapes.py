"""Batches by their shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from octavo.errors import UserError
from octavo.sources.shapes import SAMPLE_FILE, batch_of, shapes_of, stored_sample


def test_a_batch_comes_back_in_its_structure_without_its_numbers() -> None:
    batch = {"ids": torch.tensor([[7, 8]]), "x": (torch.full((2, 3), 9.0).half(), [torch.tensor([False]), None, 3])}
    text = json.dumps(shapes_of(batch))
    assert not {"7", "8", "9"} & set(text)
    made = batch_of(json.loads(text))
    assert shapes_of(made) == shapes_of(batch)
    assert made["ids"].tolist() == [[1, 1]]
    assert made["x"][1][1:] == [None, 3]


def test_what_is_no_batch_of_tensors_has_no_shapes() -> None:
    assert shapes_of(lambda model: model) is None
    assert shapes_of({"x": object()}) is None
    assert shapes_of({"text": "somebody's words"}) is None


def test_a_damaged_sample_is_refused(tmp_path: Path) -> None:
    assert stored_sample(tmp_path) is None
    for text in ("{", '{"shape": [2], "dtype": "nothing"}', '{"other": 1}'):
        (tmp_path / SAMPLE_FILE).write_text(text)
        with pytest.raises(UserError, match="damaged"):
            stored_sample(tmp_path)
