"""Blocks and scales: the views are faithful and the rules are exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import UserError
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scaling import (
    amax,
    expand_scale,
    from_blocks,
    min_max,
    scale_from_amax,
    scale_from_range,
    search_scale,
    to_blocks,
)
from octavo.spec.element import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, INT4, INT8, MXINT8_ELEMENT, UINT4, UINT8
from octavo.spec.formats import FORMATS, INT4_G128, NVFP4, tensor_format
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Ragged,
    ScaleRule,
    TensorFormat,
    scaled,
)

GRANULARITIES = [
    PerTensor(),
    PerChannel(),
    PerChannel(0),
    PerToken(),
    PerGroup(5),
    PerGroup(4),
    PerTile(3, 4),
    PerFlatGroup(7),
]
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
every_shape = pytest.mark.parametrize(
    "shape", [(6, 20), (7, 9), (2, 5, 13), (1, 1), (2, 3, 4, 5), (0, 8), (3, 0)], ids=str
)


def random(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_numbers(shape, granularity) -> np.ndarray:
    """Which scale each value belongs to, one index at a time, straight from the definitions."""
    numbers = np.empty(shape, dtype=np.int64)
    scales = np.arange(math.prod(granularity.scale_shape(shape))).reshape(granularity.scale_shape(shape))
    for position, index in enumerate(np.ndindex(*shape)):
        match granularity:
            case PerTensor():
                where = ()
            case PerChannel(axis):
                where = index[: axis % len(shape) + 1]
            case PerToken():
                where = index[:-1]
            case PerGroup(size):
                where = (*index[:-1], index[-1] // size)
            case PerTile(rows, cols):
                where = (*index[:-2], index[-2] // rows, index[-1] // cols)
            case PerFlatGroup(size):
                where = (position // size,)
        numbers[index] = scales[where]
    return numbers


@every_granularity
@every_shape
def test_amax_and_min_max_are_those_of_the_values_that_share_a_scale(granularity, shape):
    x = random(shape)
    numbers = torch.from_numpy(block_numbers(shape, granularity)).flatten()
    size = math.prod(granularity.scale_shape(shape))
    high = torch.zeros(size).scatter_reduce(0, numbers, x.flatten(), "amax")
    low = torch.zeros(size).scatter_reduce(0, numbers, x.flatten(), "amin")
    assert torch.equal(amax(x, granularity).flatten(), torch.maximum(high, -low))
    assert amax(x, granularity).shape == granularity.scale_shape(shape)
    lows, highs = min_max(x, granularity)
    assert lows.shape == highs.shape == granularity.scale_shape(shape)
    assert torch.equal(lows.flatten().clamp(max=0), low)
    assert torch.equal(highs.flatten().clamp(min=0), high)


@every_granularity
@every_shape
def test_every_value_meets_its_own_scale_and_comes_back(granularity, shape):
    numbers = torch.from_numpy(block_numbers(shape, granularity))
    scale = torch.arange(math.prod(granularity.scale_shape(shape))).view(granularity.scale_shape(shape))
    blocks, _ = to_blocks(torch.zeros(shape, dtype=torch.int64), granularity)
    assert torch.equal(from_blocks(blocks + expand_scale(scale, granularity, shape), granularity, shape), numbers)
    x = random(shape)
    assert torch.equal(from_blocks(to_blocks(x, granularity)[0], granularity, shape), x)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerToken(), PerGroup(4), PerTile(3, 5)], ids=str)
def test_full_blocks_are_a_view_whatever_the_strides(granularity):
    x = random((20, 6)).T
    assert to_blocks(x, granularity)[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@every_granularity
def test_nan_and_infinity_reach_the_amax_of_their_block_alone(granularity):
    for bad in (math.nan, math.inf):
        x = random((6, 20))
        x[3, 7] = bad
        numbers = block_numbers((6, 20), granularity)
        found = amax(x, granularity).flatten().isfinite().logical_not().nonzero().flatten().tolist()
        assert found == [numbers[3, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_amax_of_any_float_dtype_is_fp32_and_exact(dtype):
    x = random((6, 32)).to(dtype)
    assert torch.equal(amax(x, PerGroup(16)), x.float().abs().unflatten(-1, (2, 16)).amax(-1))


@pytest.mark.parametrize(
    ("element", "top"), [(INT8, 127), (INT4, 7), (E4M3, 448), (E5M2, 57344), (E2M1, 6), (UINT8, 255)]
)
def test_the_amax_rule_divides_by_the_largest_value(element, top):
    x = random((1000,)).abs()
    assert torch.equal(scale_from_amax(x, scaled(element, PerToken())), x / top)


MX = [E2M1, E2M3, E3M2, E4M3, E5M2, MXINT8_ELEMENT]
hard_amax = torch.cat(
    [
        torch.tensor([2.0**e * m for e in range(-126, 127) for m in (1.0, 1.25, 1.5, 1.75, 1.875, 448 / 256)]),
        random((2000,)).abs() * random((2000,), 1).mul(20).exp2(),
    ]
)
hard_amax = torch.cat(
    [hard_amax, torch.nextafter(hard_amax, torch.tensor(math.inf)), hard_amax.nextafter(torch.tensor(0.0))]
)


def mx(element, rule) -> TensorFormat:
    return TensorFormat(element, PerGroup(32), scale=TensorFormat(E8M0), scale_rule=rule)


@pytest.mark.parametrize("element", MX, ids=lambda e: e.name)
def test_power_floor_is_the_rule_of_the_microscaling_specification_exactly(element):
    scale = scale_from_amax(hard_amax, mx(element, ScaleRule.POWER_FLOOR))
    emax = math.frexp(element.max)[1] - 1
    theirs = [2.0 ** min(127, max(-127, math.frexp(a)[1] - 1 - emax)) for a in hard_amax.tolist()]
    assert scale.tolist() == theirs


@pytest.mark.parametrize("element", MX, ids=lambda e: e.name)
def test_power_ceil_is_the_smallest_power_that_never_saturates(element):
    scale = scale_from_amax(hard_amax, mx(element, ScaleRule.POWER_CEIL)).double()
    inner = scale > 2.0**-127
    assert (hard_amax[inner] <= scale[inner] * element.max).all()
    assert (hard_amax[inner] > scale[inner] / 2 * element.max).all()


@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
@pytest.mark.parametrize("element", [E4M3, E2M1], ids=lambda e: e.name)
def test_power_rules_agree_with_torchao(mode, element):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtype = {E4M3: torch.float8_e4m3fn, E2M1: torch.float4_e2m1fn_x2}[element]
    x = random((64, 128)) * random((64, 1), 1).mul(8).exp2()
    theirs, _ = mx_tensor.to_mx(x, dtype, 32, getattr(mx_tensor.ScaleCalculationMode, mode))
    rule = {"FLOOR": ScaleRule.POWER_FLOOR, "RCEIL": ScaleRule.POWER_CEIL}[mode]
    assert torch.equal(scale_from_amax(amax(x, PerGroup(32)), mx(element, rule)), theirs.float())


@pytest.mark.parametrize("rule", ScaleRule)
def test_a_block_of_zeros_has_scale_one_unless_scales_are_scaled_again(rule):
    zero = torch.tensor([0.0, 1.0])
    assert scale_from_amax(zero, TensorFormat(INT4, PerGroup(32), scale=PLAIN_FP32, scale_rule=rule))[0] == 1
    assert scale_from_amax(zero, TensorFormat(INT4, PerGroup(32), scale=NVFP4.scale, scale_rule=rule))[0] == 0


@pytest.mark.parametrize("rule", ScaleRule)
def test_an_amax_that_is_not_finite_gives_a_scale_that_is_not(rule):
    fmt = TensorFormat(INT4, PerGroup(32), scale=PLAIN_FP32, scale_rule=rule)
    assert not scale_from_amax(torch.tensor([math.nan, math.inf]), fmt).isfinite().any()


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("element", [INT4, INT8, UINT4, UINT8], ids=lambda e: e.name)
@given(a=floats, b=floats)
def test_an_asymmetric_range_contains_zero_exactly_and_reaches_both_ends(element, a, b):
    fmt = scaled(element, PerTensor(), asymmetric=True)
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = scale_from_range(low, high, fmt)
    assert scale > 0
    assert element.min_code <= zero_point <= element.max_code
    bottom = scale.double() * (element.min_code - zero_point.double())
    top = scale.double() * (element.max_code - zero_point.double())
    slack = 0.5001 * scale.double()  # half a step: the zero point was rounded
    slack += (element.max_code - element.min_code) * 2.0**-150  # the scale itself, where it is subnormal
    assert bottom - slack <= min(low.item(), 0.0)
    assert top + slack >= max(high.item(), 0.0)


def test_the_widest_range_does_not_overflow():
    top = torch.tensor(torch.finfo(torch.float32).max)
    scale, zero_point = scale_from_range(-top, top, tensor_format("int8-tensor-asymmetric"))
    assert scale.isfinite()
    assert zero_point in (-1, 0)


def test_a_symmetric_range_takes_the_larger_magnitude_and_no_zero_point():
    scale, zero_point = scale_from_range(torch.tensor(-254.0), torch.tensor(1.0), tensor_format("int8-tensor"))
    assert (scale.item(), zero_point) == (2.0, None)


def test_asymmetric_scales_agree_with_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
    low, high = min_max(random((64, 128)), PerGroup(32))
    theirs, points = helpers.calculate_qparams(low, high, args)
    scale, zero_point = scale_from_range(low, high, FORMATS["int4-group32-asymmetric"])
    assert torch.equal(scale, theirs)
    assert torch.equal(zero_point, points)


def squared_error(x: torch.Tensor, fmt: TensorFormat, scale: torch.Tensor) -> torch.Tensor:
    blocks, dims = to_blocks((fake_quantize(x, fmt, scale=scale) - x).square(), fmt.granularity)
    return blocks.sum(dims)


SEARCHABLE = [
    INT4_G128,
    scaled(INT4, PerGroup(32)),
    scaled(INT8, PerTensor()),
    scaled(E4M3, PerChannel()),
    scaled(INT4, PerTile(16, 32)),
    scaled(E2M1, PerFlatGroup(48)),
    TensorFormat(INT4, PerGroup(48), scale=PLAIN_FP32, ragged=Ragged.PAD),
    mx(E2M1, ScaleRule.POWER_FLOOR),
]


@pytest.mark.parametrize("fmt", SEARCHABLE, ids=str)
def test_the_search_returns_the_best_of_its_grid_for_every_block(fmt):
    x = random((32, 128)) * random((32, 1), 1).exp()
    found = squared_error(x, fmt, search_scale(x, fmt, steps=12))
    base = scale_from_amax(amax(x, fmt.granularity), fmt)
    factors = [2.0, 1.0, 0.5] if fmt.scale_rule is not ScaleRule.AMAX else torch.linspace(1, 0.4, 12).tolist()
    brute = torch.stack([squared_error(x, fmt, base * f) for f in factors]).amin(0)
    torch.testing.assert_close(found, brute, rtol=1e-4, atol=1e-9)


def test_the_search_halves_no_less_than_a_quarter_of_the_error_of_int4_weights():
    x = random((256, 512))
    plain = (fake_quantize(x, INT4_G128) - x).square().mean()
    searched = (fake_quantize(x, INT4_G128, scale=search_scale(x, INT4_G128)) - x).square().mean()
    assert searched < 0.76 * plain


def test_the_search_does_not_depend_on_how_rows_are_chunked():
    x = random((64, 256))
    whole = search_scale(x, INT4_G128)
    assert torch.equal(whole, torch.cat([search_scale(rows, INT4_G128) for rows in x.split(5)]))


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 128), torch.zeros(0, 128), torch.full((2, 128), 1e-45)], ids=["0", "empty", "tiny"]
)
def test_the_search_survives_what_has_no_scale(x):
    scale = search_scale(x, INT4_G128)
    assert (scale > 0).all()
    assert scale.shape == INT4_G128.granularity.scale_shape(tuple(x.shape))


@pytest.mark.parametrize("fmt", [NVFP4, tensor_format("int4-group32-asymmetric")], ids=str)
def test_the_search_refuses_what_it_cannot_do(fmt):
    with pytest.raises(UserError, match="no scale search"):
        search_scale(torch.ones(4, 64), fmt)
