"""Every backend gives the bits of ``numerics``, for every format that it takes. A new member is picked up by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from contracts.places import BITS, DTYPES, every_backend, place
from octavo.backends.base import Backend
from octavo.backends.codes import pack
from octavo.backends.native import LIBRARY
from octavo.backends.simulate import fake_quantize, format_key, range_of
from octavo.numerics import packing, qtensor, scaling
from octavo.numerics.codec import decode
from octavo.spec.element import FloatFormat
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
    scaled,
)

GRANULARITIES: list[Granularity] = [
    PerTensor(), PerChannel(), PerChannel(0), PerToken(), PerGroup(16), PerGroup(32), PerGroup(7), PerGroup(300),
    PerFlatGroup(64), PerFlatGroup(5), PerTile(4, 8), PerTile(5, 300),
]  # fmt: skip
SHAPES = [(16, 256), (3, 5, 100), (1, 1)]
ELEMENTS = sorted({fmt.element.name for fmt in FORMATS.values()})
every_element = pytest.mark.parametrize("element", ELEMENTS)


@pytest.fixture(scope="module", autouse=True)
def every_backend_is_ready() -> None:
    LIBRARY.wait()


def values(dtype: torch.dtype) -> Tensor:
    """Values of many sizes, a row of zeros, signed zeros, denormals, and the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 256, generator=generator) * torch.exp(2 * torch.randn(16, 256, generator=generator))
    x[0] = 0
    x[1, :8] = torch.tensor([1e-30, -1e-30, -0.0, 1e30, -3e-9, 6e4, -6e4, 1e-41])
    return x.to(dtype)


def taken(backend: Backend, element: str, x: Tensor) -> Iterator[tuple[str, TensorFormat]]:
    """The catalogue's formats of an element; a refusal has a reason."""
    for name, fmt in FORMATS.items():
        if fmt.element.name == element:
            support = backend.supports(x, fmt)
            assert support.ok or support.reason, name
            if support.ok:
                yield name, fmt


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    """Bit for bit, the sign of zero included; NaN are all one."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    if not found.is_floating_point():
        assert torch.equal(found, expected), name
        return
    bits = BITS[found.dtype]
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    assert same.all(), f"{name}: {found[~same][:5].tolist()}, not {expected[~same][:5].tolist()}"


@every_element
@every_backend
def test_rounding_and_codes_are_those_of_numerics(backend: Backend, element: str) -> None:
    for dtype in DTYPES:
        x = values(dtype).clamp(-6e4, 6e4).to(place(backend))
        for name, fmt in taken(backend, element, x):
            scale, zero_point = range_of(x, fmt)
            plain = one_level(fmt)  # scales are given as they are stored: numerics shall not round them again
            for shrunk in (scale, scale / 128):
                expected = qtensor.fake_quantize(x, plain, scale=shrunk, zero_point=zero_point)
                assert_same(backend.fake_quantize(x, fmt, shrunk, zero_point), expected, name)
                expected = qtensor.quantize(x, plain, scale=shrunk, zero_point=zero_point).codes
                assert_same(backend.codes(x, fmt, shrunk, zero_point), expected, name)


@every_element
@every_backend
def test_what_a_weight_becomes_is_what_numerics_makes_of_it(backend: Backend, element: str) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3).to(place(backend))
    for name, fmt in taken(backend, element, x):
        found, expected = qtensor.quantize(x, fmt, loops=backend), qtensor.quantize(x, fmt)
        assert_same(found.codes, expected.codes, name)
        assert_same(found.dequantize(), expected.dequantize(), name)
        if fmt.element.bits <= 8:
            bits = fmt.element.bits
            assert_same(pack(found.codes[:, :253], bits), packing.pack(expected.codes[:, :253], bits), name)


@every_element
@every_backend
def test_a_calibrated_outer_scale_gives_the_bits_of_numerics(backend: Backend, element: str) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3).to(place(backend))
    for name, fmt in taken(backend, element, x):
        if fmt.is_nested and fmt.outermost.granularity == PerTensor():
            outer = scaling.outer_scale_from_amax(torch.tensor(2e3, device=x.device), fmt)
            found = qtensor.fake_quantize(x, fmt, outer_scale=outer, loops=backend)
            assert_same(found, qtensor.fake_quantize(x, fmt, outer_scale=outer), name)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@every_backend
def test_ranges_are_those_of_numerics(backend: Backend, granularity: Granularity) -> None:
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        x = values(dtype).flatten()[: math.prod(shape)].view(shape).clamp(-6e4, 6e4).to(place(backend))
        for y in (x, x.index_fill(-1, torch.tensor([shape[-1] - 1], device=x.device), torch.nan)):
            assert_same(backend.amax(y, granularity), scaling.amax(y, granularity), str(shape))
            ranges = zip(backend.min_max(y, granularity), scaling.min_max(y, granularity), strict=True)
            assert all(torch.equal(one.nan_to_num(-1e9), other.nan_to_num(-1e9)) for one, other in ranges)


@every_element
@every_backend
def test_nan_stays_nan_and_inf_saturates(backend: Backend, element: str) -> None:
    x = torch.ones(4, 256, device=place(backend))
    x[0, 0], x[1, 0], x[2, 0] = torch.nan, torch.inf, -torch.inf
    for name, fmt in taken(backend, element, x):
        scale = torch.ones(fmt.granularity.scale_shape(tuple(x.shape)), device=x.device)
        if fmt.is_symmetric:
            found = backend.fake_quantize(x, fmt, scale, None)
            assert found.isnan().nonzero().tolist() == [[0, 0]], name
            assert found[1:3, 0].tolist() == [fmt.element.max, fmt.element.min], name
        if isinstance(fmt.element, FloatFormat) and fmt.element.nan != "none":
            codes = backend.codes(x, fmt, scale, None)
            assert_same(codes, qtensor.quantize(x, one_level(fmt), scale=scale).codes, name)
            assert decode(codes, fmt.element).isnan().nonzero().tolist() == [[0, 0]], name


@every_element
@every_backend
def test_errors_of_candidate_scales_are_summed_in_the_same_order(backend: Backend, element: str) -> None:
    for _, fmt in itertools.islice(taken(backend, element, torch.ones(1, device=place(backend))), 1):
        for width in (1, 7, 16, 128, 300, 70_001):
            rows = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(place(backend))
            scale = rows.abs().amax(1) / fmt.element.max * 0.9
            found = backend.squared_error(rows, scale, fmt.element)
            assert_same(found, scaling.squared_error(rows, scale, fmt.element), str(width))
            exact = (qtensor.fake_quantize(rows, scaled(fmt.element, PerChannel(0)), scale=scale) - rows).double()
            torch.testing.assert_close(found.double(), exact.square().sum(1), rtol=1e-5, atol=1e-12)


@every_element
@every_backend
def test_dynamic_simulation_is_numerics(backend: Backend, element: str) -> None:
    for dtype in DTYPES:
        x = values(dtype).clamp(-1e3, 1e3).to(place(backend))
        x[3, 3], x[4, 4] = torch.nan, torch.inf
        for name, fmt in taken(backend, element, x):
            assert_same(qtensor.fake_quantize(x, fmt, loops=backend), qtensor.fake_quantize(x, fmt), name)


@every_element
def test_the_operator_is_numerics(element: str) -> None:
    x = values(torch.float32).clamp(-1e3, 1e3)
    for name, fmt in FORMATS.items():
        if fmt.element.name == element:
            assert_same(fake_quantize(x, format_key(fmt), None), qtensor.fake_quantize(x, fmt), name)


def test_the_input_is_never_changed() -> None:
    x = values(torch.float32)
    before = x.clone()
    for name in ("e4m3-tensor", "int8-channel-asymmetric", "nvfp4", "nf4"):
        fake_quantize(x, format_key(FORMATS[name]), None)
    assert torch.equal(x, before)
