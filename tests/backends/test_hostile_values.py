"""What models with trouble feed a backend: any scale, zero points at the ends, infinities, NaN, odd strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contracts.places import BITS, DTYPES, every_backend, place
from octavo.backends.simulate import range_of
from octavo.numerics import qtensor
from octavo.spec.element import FP32
from octavo.spec.formats import FORMATS, NVFP4
from octavo.spec.tensor_format import PLAIN_FP32, PerTensor, TensorFormat

SHAPE = (6, 256)
HUGE = (3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, -0.0)
PER_TENSOR = [name for name, fmt in FORMATS.items() if isinstance(fmt.granularity, PerTensor)]

pytestmark = every_backend


def boundaries(dtype: torch.dtype, device: str) -> Tensor:
    """Both sides of every rounding boundary of small integers, many magnitudes, huge values, and zeros."""
    dice = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=dice) * torch.exp2(torch.randint(-20, 12, SHAPE, generator=dice).float())
    halves = torch.arange(-128, 128) / 2
    x[1] = halves
    x[2] = torch.nextafter(halves, torch.full_like(halves, torch.inf))
    x[3] = torch.nextafter(halves, torch.full_like(halves, -torch.inf))
    x[4, : len(HUGE)] = torch.tensor(HUGE)
    x[5] = 0
    return x.to(device, dtype)


def assert_same_bits(backend, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> None:
    ours = backend.fake_quantize(x, fmt, scale, zero_point)
    reference = qtensor.fake_quantize(x, fmt, scale=scale, zero_point=zero_point)
    assert torch.equal(ours.isnan(), reference.isnan())
    same = (ours.view(BITS[x.dtype]) == reference.view(BITS[x.dtype])) | ours.isnan()
    assert same.all(), f"{x[~same][:5].tolist()}: {ours[~same][:5].tolist()}, not {reference[~same][:5].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PER_TENSOR)
def test_any_scale_and_zero_point_give_the_bits_of_numerics(backend, name: str, dtype: torch.dtype) -> None:
    """A scale of 0 (a damaged file) makes zeros, not NaN."""
    x, fmt = boundaries(dtype, place(backend)), FORMATS[name]
    element = fmt.zero_point
    for scale in (1.0, 1 / 3, 1e-3, 1e-30, 1e30, 2.0**-126, 2.0**-140, 0.0):
        for point in [None] if element is None else [element.min_code, -1, 0, 1, element.max_code]:
            zero_point = None if point is None else torch.tensor(point, dtype=torch.int32, device=x.device)
            assert_same_bits(backend, x, fmt, torch.tensor(scale, device=x.device), zero_point)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["int4-group32", "int8-channel-asymmetric", "int8-token", "e4m3-channel", "e5m2-token"]
)
def test_infinities_saturate_and_a_nan_stays_where_it_is(backend, name: str, dtype: torch.dtype) -> None:
    x, fmt = boundaries(dtype, place(backend)), FORMATS[name]
    scale, zero_point = range_of(x.masked_fill(~x.isfinite(), 0).clamp(-1e3, 1e3), fmt)
    assert_same_bits(backend, x, fmt, scale, zero_point)
    found = backend.fake_quantize(x, fmt, scale, zero_point)
    assert torch.equal(found.isnan(), x.isnan())


@pytest.mark.parametrize("name", ["int8-tensor", "e4m3-tensor", "int4-group32", "int8-channel-asymmetric"])
def test_views_and_strides_do_not_matter(backend, name: str) -> None:
    x, fmt = boundaries(torch.float32, place(backend)).nan_to_num(0, 1e3, -1e3).clamp(-1e3, 1e3), FORMATS[name]
    for view in (x.t().contiguous().t(), x[::2], x.expand(2, *SHAPE), x[:, :128]):
        assert_same_bits(backend, view, fmt, *range_of(view, fmt))


def test_torch_s_defaults_do_not_matter(backend) -> None:
    x, fmt = (
        boundaries(torch.float32, place(backend)).nan_to_num(0, 1e3, -1e3).clamp(-1e3, 1e3),
        FORMATS["int8-token-asymmetric"],
    )
    ranges, codes = backend.min_max(x, fmt.granularity), backend.codes(x, fmt, *range_of(x, fmt))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert_same_bits(backend, x, fmt, *range_of(x, fmt))
            for found, expected in zip(backend.min_max(x, fmt.granularity), ranges, strict=True):
                assert torch.equal(found, expected)
            assert torch.equal(backend.codes(x, fmt, *range_of(x, fmt)), codes)
    finally:
        torch.set_default_dtype(torch.float32)


def test_more_values_than_one_part_are_all_rounded(backend) -> None:
    x = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(1)).to(place(backend))
    for name in ("int8-tensor", "e4m3-tensor", "int8-tensor-asymmetric"):
        assert_same_bits(backend, x, FORMATS[name], *range_of(x, FORMATS[name]))


@pytest.mark.parametrize("fmt", [NVFP4, PLAIN_FP32, TensorFormat(FP32, PerTensor(), scale=PLAIN_FP32)], ids=str)
def test_a_refusal_carries_its_reason(backend, fmt: TensorFormat) -> None:
    support = backend.supports(torch.ones(2, 16), fmt)
    assert support.ok or support.reason
