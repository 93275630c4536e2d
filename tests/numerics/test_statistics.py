"""Sums over rows are the sums that float64 gives; scales and rotations act on them as on the rows."""

from __future__ import annotations

import pytest
import torch

from octavo.numerics.histogram import NotFiniteError
from octavo.numerics.statistics import Gatherer, InputStatistics, Need, add_gram

ROWS = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 20)
FULL = ROWS + 0.1 * torch.randn(300, 20, generator=torch.Generator().manual_seed(1))


def gathered(rows: torch.Tensor, full: torch.Tensor = FULL) -> InputStatistics:
    gatherer = Gatherer(Need)
    for part, other in zip(rows.split(70), full.split(70), strict=True):
        gatherer.update(part, other)
    return gatherer.statistics()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_sums_are_those_of_all_rows() -> None:
    found, rows = gathered(ROWS), ROWS.double()
    assert found.count == 300
    assert found.gram is not None
    assert found.cross is not None
    close(found.gram, rows.T @ rows)
    close(found.cross, FULL.double().T @ rows)
    close(found.mean, rows.mean(0))
    close(found.mean_square, rows.square().mean(0))
    assert torch.equal(found.amax, ROWS.abs().amax(0))
    assert torch.equal(found.gram, found.gram.T)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_the_upper_triangle_in_strips_is_the_gram_matrix(width: int) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(2))
    gram = torch.zeros(width, width)
    add_gram(gram, rows)
    close(gram.triu(), (rows.double().T @ rows.double()).triu())


def test_statistics_of_a_divided_input_are_those_of_its_rows() -> None:
    scale = torch.logspace(-1, 1, 20)
    ours, theirs = gathered(ROWS).divided_by(scale), gathered(ROWS / scale, FULL / scale)
    for name in ("amax", "mean", "mean_square", "gram", "cross"):
        close(getattr(ours, name), getattr(theirs, name))


def test_statistics_of_a_turned_input_are_those_of_its_rows() -> None:
    matrix, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(3)))
    ours, theirs = gathered(ROWS).turned(lambda x: x @ matrix), gathered(ROWS @ matrix, FULL @ matrix)
    for name in ("mean", "mean_square", "gram", "cross"):
        close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused_and_leave_nothing(bad: float) -> None:
    gatherer = Gatherer({Need.GRAM})
    gatherer.update(ROWS)
    spoilt = ROWS.clone()
    spoilt[7, 3] = bad
    with pytest.raises(NotFiniteError):
        gatherer.update(spoilt)
    found = gatherer.statistics()
    assert found.count == 300
    assert found.gram is not None
    assert bool(found.gram.isfinite().all())


def test_products_are_of_rounded_rows_and_ranges_of_the_others() -> None:
    rounded = ROWS.round()
    gatherer = Gatherer(Need)
    gatherer.update(ROWS, rounded=rounded)
    found = gatherer.statistics()
    assert found.gram is not None
    assert found.cross is not None
    assert found.drift is not None
    close(found.gram, rounded.double().T @ rounded.double())
    close(found.cross, ROWS.double().T @ rounded.double())
    close(found.drift, (ROWS - rounded).double().T @ (ROWS - rounded).double())
    assert torch.equal(found.amax, ROWS.abs().amax(0))
