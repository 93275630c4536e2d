"""Scales of scales, and the rules that choose scales, each against its definition."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from octavo.errors import UserError
from octavo.numerics.qtensor import fake_quantize, quantize, quantize_scale
from octavo.numerics.scaling import outer_scale_from_amax
from octavo.spec.element import E4M3, INT8
from octavo.spec.formats import FORMATS, NVFP4, tensor_format
from octavo.spec.tensor_format import PLAIN_FP32, PerToken, ScaleRule, TensorFormat


def weights(shape: tuple[int, ...] = (32, 128), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn((shape[0], 1), generator=generator).exp()


def as_e4m3(x: np.ndarray) -> np.ndarray:
    return x.clip(2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0, 1e4])
def test_nvfp4_on_a_calibrated_scale_is_its_published_formula(share: float) -> None:
    x = weights().numpy()
    outer = np.float32(np.abs(x).max() * share / 2688)
    groups = x.reshape(32, 8, 16)
    local = as_e4m3(np.abs(groups).max(-1) / np.float32(6) / outer)
    step = (local * outer)[..., None]
    expected = (groups / step).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * step
    found = fake_quantize(torch.from_numpy(x), NVFP4, outer_scale=torch.tensor(outer))
    assert np.array_equal(found.numpy(), expected.reshape(x.shape))
    if share < 1:
        assert found.abs().max() == pytest.approx(6 * 448 * outer, rel=1e-6), "what exceeds the range saturates"


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-four-over-six", "nvfp4-in-fp8", "mxfp4", "int8-tensor"])
def test_the_outer_scale_that_would_be_found_changes_nothing_when_it_is_given(name: str) -> None:
    x, fmt = weights(), FORMATS[name]
    if name == "mxfp4":
        outer = quantize(x, fmt).scale.dequantize()
    else:
        outer = outer_scale_from_amax(x.abs().max(), fmt)
    assert torch.equal(fake_quantize(x, fmt, outer_scale=outer), fake_quantize(x, fmt))
    assert torch.equal(quantize(x, fmt, outer_scale=outer).dequantize(), fake_quantize(x, fmt))


def test_one_level_has_one_scale() -> None:
    with pytest.raises(UserError, match="one level of scales"):
        fake_quantize(weights(), tensor_format("int8-tensor"), scale=torch.ones(()), outer_scale=torch.ones(()))


def test_given_group_scales_are_rounded_on_a_given_outer_scale() -> None:
    x, groups, outer = weights(), torch.rand(32, 8) + 0.1, torch.tensor(0.01)
    q = quantize(x, NVFP4, scale=groups, outer_scale=outer)
    assert torch.equal(q.scale.scale, outer)
    expected = as_e4m3((groups / outer).numpy())
    assert np.array_equal(q.scale.dequantize().numpy(), expected * outer.numpy())
    assert torch.equal(fake_quantize(x, NVFP4, scale=groups, outer_scale=outer), q.dequantize())
    assert torch.equal(quantize_scale(groups, NVFP4.scale, scale=outer).codes, q.scale.codes)


def test_four_over_six_takes_the_better_of_two_grids_in_every_group() -> None:
    x, fmt = weights(), tensor_format("nvfp4-four-over-six")
    q = quantize(x, fmt)
    assert q.scale.scale == pytest.approx(float(x.abs().max()) / (6 * 256))
    errors, levels = [], []
    for top in (6.0, 4.0):
        amax = x.unflatten(-1, (8, 16)).abs().amax(-1)
        given = quantize(x, fmt, scale=amax / top, outer_scale=q.scale.scale)
        errors.append((given.dequantize() - x).unflatten(-1, (8, 16)).square().sum(-1))
        levels.append(given.scale.codes)
    is_four = errors[1] < errors[0]
    assert 0.2 < is_four.float().mean() < 0.8
    assert torch.equal(q.scale.codes, torch.where(is_four, levels[1], levels[0]))


def test_full_range_puts_the_largest_magnitude_on_minus_eight() -> None:
    x = weights()
    q = quantize(x, tensor_format("int4-group32-full-range"))
    groups = x.unflatten(-1, (4, 32))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(q.scale, extreme / -8)
    assert (q.scale < 0).any()
    assert (q.scale > 0).any()
    codes = q.codes.unflatten(-1, (4, 32)).gather(-1, groups.abs().argmax(-1, keepdim=True))
    assert (codes == -8).all()
    plain = fake_quantize(x, tensor_format("int4-group32"))
    assert (q.dequantize() - x).norm() < (plain - x).norm()


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_of_zeros_is_zeros(name: str) -> None:
    x = weights()
    x[4:9] = 0
    q = quantize(x, FORMATS[name])
    assert (q.dequantize()[4:9] == 0).all()
    assert q.dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["int8-token", "e4m3-group32", "int4-group32-asymmetric", "int4-group32-full-range", "mxfp4", "mxint8-ceil"]
)
def test_what_has_no_range_is_nan_in_its_block_alone_and_has_no_codes(name: str, bad: float) -> None:
    x, fmt = weights(), FORMATS[name]
    x[3, 40] = bad
    is_bad = fake_quantize(x, fmt).isnan()
    width = 128 if name == "int8-token" else 32
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[3, 40 // width * width : 40 // width * width + width] = True
    assert torch.equal(is_bad, expected)
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize(x, fmt)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_in_a_nested_format_all_that_shares_the_outer_scale_is_lost_unless_it_is_given(bad: float) -> None:
    x = weights()
    x[3, 40] = bad
    assert fake_quantize(x, NVFP4).isnan().all()
    found = fake_quantize(x, NVFP4, outer_scale=torch.tensor(0.01)).isnan()
    assert found.sum() == 16
    assert found[3, 32:48].all()


def test_an_infinity_saturates_on_a_given_scale() -> None:
    x = torch.tensor([[math.inf, -math.inf, 1.0]])
    found = fake_quantize(x, tensor_format("e4m3-tensor"), scale=torch.tensor(0.5))
    assert found.tolist() == [[224.0, -224.0, 1.0]]


def test_scales_are_not_below_the_formats_least() -> None:
    fmt = TensorFormat(E4M3, PerToken(), PLAIN_FP32, min_scale=1e-3)
    q = quantize(torch.tensor([[448.0], [1e-4], [0.0]]), fmt)
    assert q.scale.tolist() == pytest.approx([1.0, 1e-3, 1.0])


@pytest.mark.parametrize("rule", [ScaleRule.AMAX, ScaleRule.POWER_FLOOR, ScaleRule.POWER_CEIL])
def test_top_is_where_amax_goes(rule: ScaleRule) -> None:
    fmt = TensorFormat(INT8, PerToken(), PLAIN_FP32, scale_rule=rule, top=64.0)
    q = quantize(torch.tensor([[1.0, 0.5], [128.0, -3.0]]), fmt)
    assert q.codes[:, 0].tolist() == [64, 64]
