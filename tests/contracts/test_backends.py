"""Every backend gives the bits of ``numerics``, for every format that it takes. A new member is picked up by itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from octavo.backends.codes import pack
from octavo.backends.native import LIBRARY
from octavo.backends.simulate import BACKENDS, fake_quantize, format_key, range_of
from octavo.numerics import packing, qtensor, scaling
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    TensorFormat,
    one_level,
)

GRANULARITIES = [
    PerTensor(), PerChannel(), PerChannel(0), PerToken(), PerGroup(16), PerGroup(32), PerGroup(7), PerGroup(300),
    PerFlatGroup(64), PerFlatGroup(5), PerTile(4, 8), PerTile(5, 300),
]  # fmt: skip
SHAPES = [(16, 256), (3, 5, 100), (1, 1)]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
pairs = pytest.mark.parametrize(
    ("backend", "fmt"), [pytest.param(b, f, id=f"{b.name}-{name}") for b in BACKENDS for name, f in FORMATS.items()]
)


@pytest.fixture(scope="module", autouse=True)
def every_backend_is_ready() -> None:
    LIBRARY.wait()


def values(dtype: torch.dtype) -> torch.Tensor:
    """Values of many sizes, a row of zeros, signed zeros, denormals, and the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 256, generator=generator) * torch.exp(2 * torch.randn(16, 256, generator=generator))
    x[0] = 0
    x[1, :8] = torch.tensor([1e-30, -1e-30, -0.0, 1e30, -3e-9, 6e4, -6e4, 1e-41])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", BITS)
@pairs
def test_the_same_bits_as_numerics(backend, fmt: TensorFormat, dtype: torch.dtype) -> None:
    x = values(dtype).clamp(-6e4, 6e4)
    support = backend.supports(x, fmt)
    if not support.ok:
        assert support.reason
        return
    scale, zero_point = range_of(x, fmt)
    plain = one_level(fmt)  # scales are given as they are stored: numerics shall not round them again
    for shrunk in (scale, scale / 128):
        found = backend.fake_quantize(x, fmt, shrunk, zero_point)
        expected = qtensor.fake_quantize(x, plain, scale=shrunk, zero_point=zero_point)
        assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype]))
        expected = qtensor.quantize(x, plain, scale=shrunk, zero_point=zero_point).codes
        codes = backend.codes(x, fmt, shrunk, zero_point)
        assert codes.dtype == expected.dtype
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_same_ranges_as_numerics(backend, granularity: Granularity) -> None:
    for dtype, shape in itertools.product(BITS, SHAPES):
        x = values(dtype).flatten()[: math.prod(shape)].view(shape).clamp(-6e4, 6e4)
        for poisoned in (x, x.index_fill(-1, torch.tensor([shape[-1] - 1]), torch.nan)):
            assert_equal(backend.amax(poisoned, granularity), scaling.amax(poisoned, granularity))
            for found, expected in zip(
                backend.min_max(poisoned, granularity), scaling.min_max(poisoned, granularity), strict=True
            ):
                assert_equal(found, expected)


@pairs
def test_a_weight_s_codes_scales_and_bytes_are_those_of_numerics(backend, fmt: TensorFormat) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3)
    if not backend.supports(x, fmt).ok:
        return
    found, expected = qtensor.quantize(x, fmt, loops=backend), qtensor.quantize(x, fmt)
    assert torch.equal(found.codes, expected.codes)
    assert_equal(found.dequantize(), expected.dequantize())
    if fmt.element.bits <= 8:
        assert torch.equal(pack(found.codes, fmt.element.bits), packing.pack(expected.codes, fmt.element.bits))


@pairs
def test_a_calibrated_outer_scale_gives_the_bits_of_numerics(backend, fmt: TensorFormat) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3)
    if not fmt.is_nested or fmt.scale.outermost.granularity != PerTensor() or not backend.supports(x, fmt).ok:
        return
    outer = scaling.outer_scale_from_amax(torch.tensor(2e3), fmt)
    found = qtensor.fake_quantize(x, fmt, outer_scale=outer, loops=backend)
    assert_equal(found, qtensor.fake_quantize(x, fmt, outer_scale=outer))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pairs
def test_nan_stays_nan_and_inf_saturates(backend, fmt: TensorFormat) -> None:
    x = torch.ones(4, 256)
    x[0, 0], x[1, 0], x[2, 0] = torch.nan, torch.inf, -torch.inf
    if not backend.supports(x, fmt).ok or not fmt.is_symmetric:
        return
    scale = torch.ones(fmt.granularity.scale_shape(tuple(x.shape)))
    found = backend.fake_quantize(x, fmt, scale, None)
    assert torch.isnan(found[0, 0])
    assert found[1, 0] == fmt.element.max
    assert found[2, 0] == fmt.element.min


@pytest.mark.parametrize("fmt", [pytest.param(f, id=name) for name, f in FORMATS.items()])
def test_dynamic_simulation_is_numerics(fmt: TensorFormat) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3)
    assert torch.equal(fake_quantize(x, format_key(fmt), None), qtensor.fake_quantize(x, fmt))


def test_the_input_is_never_changed() -> None:
    x = values(torch.float32)
    before = x.clone()
    fake_quantize(x, format_key(FORMATS["e4m3-tensor"]), torch.tensor(0.1))
    assert torch.equal(x, before)
