"""What was learned from few rows must not do harm on others."""

import pytest
import torch

from octavo.numerics.error_feedback import Feedback, round_with_feedback
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scale_search import search_scales
from octavo.numerics.shrinkage import ENOUGH, shrinkage, shrunk
from octavo.numerics.weighting import Weighting
from octavo.spec.formats import tensor_format

WIDTH = 64
FMT = tensor_format("int4-group32")


def mixture(decay: float) -> torch.Tensor:
    """``(WIDTH, WIDTH)`` that gives white noise a spectrum which falls like ``k**-decay``."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    return (left * torch.arange(1, WIDTH + 1).pow(-decay / 2)) @ right * torch.linspace(0.3, 3, WIDTH)


def rows(count: int, decay: float, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixture(decay)


def rounded_by(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    scale, zero_point = search_scales(weight, FMT, Weighting(gram=gram))
    options = Feedback(sweeps=2)
    return round_with_feedback(weight, gram, FMT, scale=scale, zero_point=zero_point, options=options).dequantize()


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("count", [1, 8, 64, 200])
def test_other_rows_are_served_no_worse_than_by_rounding_to_nearest(decay: float, count: int) -> None:
    weight = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1))
    seen, others = rows(count, decay, 2), rows(2000, decay, 3)

    def error(found: torch.Tensor) -> float:
        return float((others @ (found - weight).T).square().sum())

    drawn = error(rounded_by(weight, shrunk(seen.T @ seen, count)))
    assert drawn < 0.95 * error(fake_quantize(weight, FMT))
    assert drawn < error(rounded_by(weight, seen.T @ seen))  # which is worse than nearest for count 64, decay 0


@pytest.mark.parametrize("decay", [0.0, 1.2])
@pytest.mark.parametrize("count", [8, 64, 1000])
def test_the_share_is_what_scikit_learn_takes(decay: float, count: int) -> None:
    """Which leaves out the terms in 2 / width."""
    covariance = pytest.importorskip("sklearn.covariance")
    x = rows(count, decay, 4)
    expected = covariance.OAS(assume_centered=True).fit(x.double().numpy()).shrinkage_
    assert shrinkage(x.T @ x, count) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["zeros", "overflown", "one channel"])
def test_whatever_comes_is_survived(kind: str) -> None:
    gram = torch.zeros(4, 4) if kind == "zeros" else torch.full((4, 4), torch.inf)
    gram = torch.tensor([[3.0]]) if kind == "one channel" else gram
    assert torch.equal(shrunk(gram, 2), gram)


def test_many_rows_are_believed() -> None:
    x = rows(ENOUGH * WIDTH, 0.6, 5)
    assert torch.equal(shrunk(x.T @ x, len(x)), x.T @ x)
