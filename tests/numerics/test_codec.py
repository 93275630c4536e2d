"""Codes and rounding against ml_dtypes, torch, torchao and an exhaustive search."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.numerics.codec import decode, encode, power_of_two, round_to
from octavo.spec.element import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    ELEMENTS,
    FP16,
    FP32,
    INT2,
    INT4,
    INT8,
    MXINT8_ELEMENT,
    NF4,
    UINT2,
    UINT4,
    CodebookFormat,
    IntFormat,
)

ML_DTYPES = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
    E8M0: ml_dtypes.float8_e8m0fnu,
}
TORCH_DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, FP16: torch.float16, BF16: torch.bfloat16}
SMALL = [element for element in ELEMENTS.values() if element.bits <= 8]
every_element = pytest.mark.parametrize("element", ELEMENTS.values(), ids=lambda e: e.name)
every_small = pytest.mark.parametrize("element", SMALL, ids=lambda e: e.name)
every_float = pytest.mark.parametrize(("element", "dtype"), ML_DTYPES.items(), ids=lambda e: getattr(e, "name", ""))
finite = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, zeros with equal signs, NaN where NaN."""
    return torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()) and torch.equal(
        a.nan_to_num(nan=-12345.0), b.nan_to_num(nan=-12345.0)
    )


def hard_values(element) -> torch.Tensor:
    """Values of the grid, the middles between them, the neighbours of both, random ones of every size, extremes."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(element.values, dtype=torch.float64)
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    near = [torch.nextafter(points, torch.full_like(points, way * math.inf)) for way in (1, -1)]
    exponents = torch.empty(20_000).uniform_(-20, 20, generator=generator)
    spread = torch.randn(20_000, generator=generator) * exponents.exp2()
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, math.inf, -math.inf])
    return torch.cat([points, *near, torch.randn(20_000, generator=generator) * element.max / 3, spread, extremes])


@every_float
def test_every_code_stands_for_what_ml_dtypes_says(element, dtype):
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(dtype).astype(np.float32))
    assert same_bits(decode(torch.from_numpy(codes), element), theirs)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(INT2, ml_dtypes.int2), (INT4, ml_dtypes.int4), (UINT2, ml_dtypes.uint2), (UINT4, ml_dtypes.uint4)],
)
def test_every_small_integer_is_what_ml_dtypes_says(element, dtype):
    info = ml_dtypes.iinfo(dtype)
    assert (element.min_code, element.max_code) == (info.min, info.max)
    values = np.arange(info.min, info.max + 1)
    theirs = torch.from_numpy(values.astype(dtype).astype(np.float32))
    assert torch.equal(decode(encode(theirs, element), element), theirs)


@every_small
def test_every_value_has_a_code_that_stands_for_it(element):
    values = torch.tensor(element.values)
    codes = encode(values, element)
    assert codes.unique().numel() == values.numel()
    assert codes.dtype == (torch.int8 if isinstance(element, IntFormat) and element.is_signed else torch.uint8)
    assert torch.equal(decode(codes, element), values)


@every_float
def test_every_code_but_duplicate_nans_is_the_code_of_its_value(element, dtype):
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = decode(codes, element)
    again = encode(values, element)
    assert torch.equal(again[~values.isnan()], codes[~values.isnan()])
    assert decode(again, element).isnan().equal(values.isnan())


@every_float
def test_rounding_agrees_with_ml_dtypes_after_clamping(element, dtype):
    x = hard_values(element)
    if (
        element is E8M0
    ):  # between its two smallest values, subnormal in fp32, ml_dtypes and torch always go up: not nearest
        x = x[(x <= 2.0**-127) | (x >= 2.0**-126)]
    theirs = torch.from_numpy(x.clamp(element.min, element.max).numpy().astype(dtype).astype(np.float32))
    assert same_bits(round_to(x, element), theirs)


@pytest.mark.parametrize(("element", "dtype"), TORCH_DTYPES.items(), ids=lambda e: getattr(e, "name", ""))
def test_rounding_agrees_with_a_torch_cast_after_clamping(element, dtype):
    x = hard_values(element if element.bits == 8 else E5M2)
    cast = x.clamp(element.min, element.max).to(dtype)
    assert same_bits(round_to(x, element), cast.float())
    codes = encode(round_to(x, element), element)
    assert torch.equal(codes.view(torch.uint8), cast.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda e: e.name)
def test_rounding_agrees_with_a_torch_cast_on_every_bf16_and_16_million_fp32(element):
    bf16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 24,), generator=generator, dtype=torch.int32)
    for x in (bf16, bits.view(torch.float32)):
        theirs = x.clamp(element.min, element.max).to(TORCH_DTYPES[element]).float()
        assert same_bits(round_to(x, element), theirs)


@pytest.mark.parametrize(
    ("element", "name"), [(E2M1, "f4"), (E2M3, "f6_e2m3"), (E3M2, "f6_e3m2")], ids=lambda e: getattr(e, "name", e)
)
def test_codes_agree_with_torchao(element, name):
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = hard_values(element)
    theirs = getattr(kernels, f"f32_to_{name}_unpacked")(x)
    assert torch.equal(encode(round_to(x, element), element), theirs)


def test_fp4_agrees_with_compressed_tensors():
    fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    x = hard_values(E2M1).clamp(-6, 6)
    assert torch.equal(round_to(x, E2M1), fp4.cast_to_fp4(x))


@every_small
def test_nothing_on_the_grid_is_nearer(element):
    x = hard_values(element)
    x = x[x.isfinite()].clamp(element.min, element.max).double()
    grid = torch.tensor(element.values, dtype=torch.float64)
    above = torch.searchsorted(grid, x).clamp(1, grid.numel() - 1)
    nearest = torch.minimum((x - grid[above - 1]).abs(), (grid[above] - x).abs())
    assert torch.equal((round_to(x, element).double() - x).abs(), nearest)


@pytest.mark.parametrize("element", [e for e in SMALL if e is not E8M0], ids=lambda e: e.name)
def test_a_tie_goes_to_the_even_code(element):
    grid = torch.tensor(element.values, dtype=torch.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    is_tie = middles == middles.float().double()
    codes = encode(round_to(middles.float(), element), element)[is_tie]
    assert is_tie.any()
    assert not (codes & 1).any()


@pytest.mark.parametrize("unit", [1.0, 2.0**-6])
def test_integers_round_as_numpy_rounds(unit):
    element = INT8 if unit == 1 else MXINT8_ELEMENT
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 60 * unit
    x[:200] = (np.arange(200) - 100.5) * unit
    theirs = np.clip(np.rint(x / unit), element.min_code, element.max_code) * unit
    assert torch.equal(round_to(torch.from_numpy(x), element), torch.from_numpy(theirs))


@every_element
@given(values=finite)
@settings(max_examples=20)
def test_rounding_is_idempotent_monotone_and_saturating(element, values):
    x = torch.tensor(sorted(values), dtype=torch.float32)
    rounded = round_to(x, element)
    assert same_bits(round_to(rounded, element), rounded)
    assert (rounded[1:] >= rounded[:-1]).all()
    assert ((rounded >= element.min) & (rounded <= element.max)).all()
    assert same_bits(decode(encode(rounded, element), element), rounded)


@every_element
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype_and_layout_gives_what_its_fp32_copy_gives(element, dtype):
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    expected = round_to(x.float().contiguous(), element)
    assert expected.dtype == torch.float32
    for view in (x, x.T.contiguous().T, torch.stack([x, x], -1)[..., 0]):
        assert same_bits(round_to(view, element), expected)
    assert same_bits(round_to(x[:1].expand(4, -1), element), expected[:1].expand(4, -1))
    assert torch.equal(x, before), "the input was overwritten"


@every_element
def test_nan_stays_nan_and_infinity_saturates(element):
    rounded = round_to(torch.tensor([math.nan, math.inf, -math.inf]), element)
    assert rounded[0].isnan()
    if element is not FP32:
        assert rounded[1:].tolist() == [element.max, element.min]


@every_element
def test_the_code_of_nan_can_be_read_where_there_is_none(element):
    assert decode(encode(torch.tensor([math.nan]), element), element).shape == (1,)


@every_element
def test_empty_tensors_and_single_values_are_fine(element):
    assert round_to(torch.empty(0, 3), element).shape == (0, 3)
    assert decode(encode(torch.empty(0, 3), element), element).shape == (0, 3)
    assert decode(encode(round_to(torch.tensor(1.0), element), element), element).shape == ()


@every_small
def test_gradients_are_the_callers_business(element):
    x = torch.randn(8, requires_grad=True)
    assert not round_to(x, element).requires_grad
    assert x.grad is None


def test_a_codebook_of_odd_length_rounds_to_its_nearest():
    book = CodebookFormat("three", (-1.0, 0.0, 2.0))
    assert book.bits == 2
    assert round_to(torch.tensor([-9.0, -0.51, -0.49, 0.99, 1.01, 9.0]), book).tolist() == [-1, -1, 0, 0, 2, 2]
    assert encode(round_to(torch.tensor([-0.5, 1.0]), book), book).tolist() == [0, 2], "ties go to the even code"


def test_nf4_agrees_with_bitsandbytes_thresholds():
    # The decision points listed in bitsandbytes' dQuantizeNF4 (csrc/kernels.cu), which are the middles of neighbours.
    thresholds = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
                  -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
                  0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
                  0.5016634166240692, 0.6427869200706482, 0.8614784181118011]  # fmt: skip
    points = torch.tensor(thresholds)
    assert encode(round_to(points - 1e-6, NF4), NF4).tolist() == list(range(15))
    assert encode(round_to(points + 1e-6, NF4), NF4).tolist() == list(range(1, 16))


def test_powers_of_two_are_exact_down_to_the_subnormal_one():
    exponents = torch.arange(-127, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-127, 128)]
