"""What factors would do is told from sums, and agrees with what they do to outputs."""

from __future__ import annotations

import pytest
import torch

from octavo.algorithms.awq import best_scale
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.rescaling import Reader, Rescaling, power_scale
from octavo.numerics.scale_search import search_scales
from octavo.numerics.weighting import Weighting
from octavo.spec.formats import tensor_format


def inputs_and_weight() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4096, 64) * torch.linspace(0.05, 4, 64)
    return x, torch.randn(96, 64)


@pytest.mark.parametrize("fmt", ["int4-group32", "int4-group32-asymmetric", "nvfp4", "mxfp4"])
def test_searched_loss_is_the_error_of_the_outputs(fmt: str) -> None:
    x, weight = inputs_and_weight()
    wanted, squares = tensor_format(fmt), x.square().mean(0)
    scale = squares.pow(0.1)
    judge = Rescaling([Reader.of(weight, wanted)], squares, x.abs().amax(0), None, is_searched=True)
    importance = Weighting(importance=squares / scale.square())
    found, points = search_scales(weight * scale, wanted, importance)
    rounded = fake_quantize(weight * scale, wanted, scale=found, zero_point=points) / scale
    error = float((x @ (rounded - weight).T).square().sum(1).mean())
    assert judge.loss(scale) == pytest.approx(error, rel=0.25), "a rough search is not far from the whole one"
    assert judge.loss(scale) < Rescaling(judge.readers, squares, judge.amax_x, None).loss(scale), "nor of no use"


def test_few_candidates_find_what_all_would() -> None:
    x, weight = inputs_and_weight()
    squares, fmt = x.square().mean(0), tensor_format("int4-group32")
    judge = Rescaling([Reader.of(weight, fmt)], squares, x.abs().amax(0), None, is_searched=True)
    columns = weight.square().mean(0).sqrt()
    powers = [power / 32 for power in range(33)]
    least = min(judge.loss(power_scale(squares.sqrt(), down, p)) for p in powers for down in (None, columns))
    found = judge.loss(best_scale(judge, squares.sqrt(), columns, points=33))
    assert least <= found <= min(1.01 * least, judge.loss(torch.ones(64)))


@pytest.mark.parametrize("points", [2, 3, 4, 5, 16, 33])
def test_any_number_of_points_does_no_harm(points: int) -> None:
    x, weight = inputs_and_weight()
    squares, fmt = x.square().mean(0), tensor_format("int4-group32")
    judge = Rescaling([Reader.of(weight, fmt)], squares, x.abs().amax(0), None, is_searched=True)
    found = best_scale(judge, squares.sqrt(), weight.square().mean(0).sqrt(), points=points)
    assert judge.loss(found) <= judge.loss(torch.ones(64))
