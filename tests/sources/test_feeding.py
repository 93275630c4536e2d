from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from octavo.errors import UserError
from octavo.sources import as_batches, feed
from octavo.sources import feeding as feeding_module


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, a: torch.Tensor, b: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.one * a + b


A, B = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])


@pytest.mark.parametrize("batch", [(A, B), [A, B], {"a": A, "b": B}])
def test_a_batch_is_what_the_model_is_called_with(batch):
    assert feed(Add(), batch).tolist() == [11, 22]


def test_a_tensor_is_the_only_argument():
    assert feed(Add(), A).tolist() == [1, 2]


def test_a_function_feeds_the_model_itself():
    seen = []
    (only,) = as_batches(lambda model: seen.append(model(A)))
    feed(Add(), only)
    assert seen[0].tolist() == [1, 2]


def test_a_data_loader_is_gone_through_again():
    data = as_batches(DataLoader(TensorDataset(A, B), batch_size=2), num_passes=2)
    for _ in range(2):
        assert [feed(Add(), batch).tolist() for batch in data] == [[11, 22]]


@pytest.mark.parametrize("data", [A, {"a": A}])
def test_one_tensor_or_dict_is_one_batch(data):
    assert [feed(Add(), batch).tolist() for batch in as_batches(data)] == [[1, 2]]


def test_a_generator_is_kept_when_it_is_needed_twice():
    data = as_batches((batch for batch in (A, B)), num_passes=2)
    assert [list(map(float, batch)) for _ in range(2) for batch in data] == [[1, 2], [10, 20]] * 2


def test_a_generator_is_not_kept_when_it_is_needed_once():
    taken = []

    def generate():
        for batch in (A, B):
            taken.append(batch)
            yield batch

    data = iter(as_batches(generate()))
    next(data)
    assert len(taken) == 1


def test_a_generator_too_large_to_keep_is_told(monkeypatch):
    monkeypatch.setattr(feeding_module, "_LIMIT_BYTES", 10)
    with pytest.raises(UserError, match=r"is a generator with more than .* 2 passes over them are needed"):
        as_batches((batch for batch in (A, B)), num_passes=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (iter([]), "the generator gave no batch"),
        ("wiki.txt", "data 'wiki.txt' is a name"),
        (Path("wiki.txt"), "data 'wiki.txt' is a name"),
        (3, "data is a int"),
        (nn.Linear(1, 1), "data is a Linear, a module"),
        ((A, B), r"is a tuple of tensors; if it is one batch, put it in a list"),
    ],
)
def test_what_is_no_data_is_told(data, message):
    with pytest.raises(UserError, match=message):
        as_batches(data)


def test_what_is_no_batch_is_told():
    with pytest.raises(UserError, match="a batch is a tensor, a tuple of arguments or a dict of them, not a int"):
        feed(Add(), 3)


def test_a_few_rows_of_a_batch_have_its_structure():
    x, mask = torch.arange(20.0).view(10, 2), torch.ones(10)
    assert feeding_module.few_rows(x).tolist() == x[:4].tolist()
    few = feeding_module.few_rows({"a": x, "b": None, "mask": mask})
    assert few["a"].tolist() == x[:4].tolist()
    assert few["b"] is None
    assert feeding_module.few_rows((x, mask))[1].shape == (4,)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(7, 3),
        torch.tensor(1.0),
        (torch.ones(64, 3), torch.ones(16)),
        {"a": torch.ones(64), "n": 3},
        {},
        print,
    ],
    ids=["small", "scalar", "two sizes", "a number", "empty", "a function"],
)
def test_where_rows_cannot_be_told_all_stay(batch):
    assert feeding_module.few_rows(batch) is None
