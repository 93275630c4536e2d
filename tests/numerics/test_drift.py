"""Weights make up for moved inputs as far as the rows that were seen can tell how, and no further."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.numerics.drift import compensated
from octavo.numerics.statistics import Gatherer, InputStatistics, Need

WIDTH, OUTPUTS = 64, 24
WEIGHT = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(1)) / 8


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(full: Tensor, live: Tensor) -> InputStatistics:
    gatherer = Gatherer({Need.GRAM, Need.CROSS})
    gatherer.update(live, full)
    return gatherer.statistics()


def error(weight: Tensor, full: Tensor, live: Tensor) -> float:
    return float((live @ weight.T - full @ WEIGHT.T).square().mean())


def test_sums_of_drift_are_those_of_differences() -> None:
    full, live = normal(50, 8, seed=2), normal(50, 8, seed=3)
    known = sums(full, live)
    torch.testing.assert_close(known.drift, (full - live).T @ (full - live))
    divided = known.divided_by(torch.full((8,), 2.0))
    torch.testing.assert_close(divided.drift, known.drift / 4)


def test_what_rows_explain_is_the_ridge_solution() -> None:
    """Inputs that were turned a little: another weight gives the same outputs."""
    full = normal(4096, WIDTH, seed=2)
    live = full @ (torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=3) / 40)
    found = compensated(WEIGHT, sums(full, live), 1e-4)
    ridge = 1e-4 * (live.T @ live).double().diagonal().mean()
    rows = torch.cat([live.double(), ridge.sqrt() * torch.eye(WIDTH).double()])
    wanted = torch.cat([full.double() @ WEIGHT.double().T, ridge.sqrt() * WEIGHT.double().T])
    torch.testing.assert_close(found.double(), torch.linalg.lstsq(rows, wanted).solution.T, rtol=1e-3, atol=1e-3)
    assert error(found, full, live) < 1e-4 * error(WEIGHT, full, live)


def test_noise_of_few_rows_is_not_taken_for_drift() -> None:
    """What was learned from few rows does no harm on others, and from many it helps."""
    others = normal(8192, WIDTH, seed=4)
    moved = others + 0.3 * normal(8192, WIDTH, seed=5)
    plain = error(WEIGHT, others, moved)
    gains = []
    for rows in (WIDTH, 96, 160, 16384):
        full = normal(rows, WIDTH, seed=6)
        found = compensated(WEIGHT, sums(full, full + 0.3 * normal(rows, WIDTH, seed=7)), 0.01)
        gains.append(1 - error(found, others, moved) / plain)
    assert gains[0] == 0.0
    assert min(gains) > -0.01
    assert gains[-1] > 0.05


def test_what_cannot_be_told_leaves_weights_as_they_are() -> None:
    full = normal(200, WIDTH, seed=2)
    assert torch.equal(compensated(WEIGHT, sums(full * 0, full * 0), 0.01), WEIGHT)
    assert torch.equal(compensated(WEIGHT, sums(full, full), 0.01), WEIGHT)
    assert torch.equal(compensated(WEIGHT, sums(full * 1e25, full * 1e25), 0.01), WEIGHT)


def rounded_sums(rows: Tensor, rounded: Tensor) -> InputStatistics:
    gatherer = Gatherer({Need.GRAM, Need.CROSS})
    gatherer.update(rows, rounded=rounded)
    return gatherer.statistics()


def test_part_of_the_step_gains_most_and_keeps_most_of_the_signal() -> None:
    """Half of it: three quarters of the gain in squared error, and a quarter of what rows without noise lose."""
    strengths = torch.logspace(0, -2, WIDTH)
    rows, others = normal(1 << 15, WIDTH, seed=2) * strengths, normal(1 << 15, WIDTH, seed=4) * strengths
    noise, other_noise = 0.05 * normal(1 << 15, WIDTH, seed=3), 0.05 * normal(1 << 15, WIDTH, seed=5)
    known = rounded_sums(rows, rows + noise)
    whole, half = (compensated(WEIGHT, known, 1e-4, part=part) for part in (1.0, 0.5))
    plain, least, between = (error(weight, others, others + other_noise) for weight in (WEIGHT, whole, half))
    assert least < 0.7 * plain
    assert abs((plain - between) / (plain - least) - 0.75) < 0.02
    torch.testing.assert_close(error(half, others, others), 0.25 * error(whole, others, others), rtol=1e-3, atol=0.0)
