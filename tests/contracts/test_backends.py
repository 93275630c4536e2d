"""Every backend gives the bits of ``numerics``, for every format that it takes. A new member is picked up by itself."""

from __future__ import annotations

import pytest
import torch

from octavo.backends.native import LIBRARY
from octavo.backends.simulate import BACKENDS, fake_quantize, format_key, range_of
from octavo.numerics import qtensor
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import TensorFormat

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
    for shrunk in (scale, scale / 128):  # a power of two: stored scales stay on their grid
        found = backend.fake_quantize(x, fmt, shrunk, zero_point)
        expected = qtensor.fake_quantize(x, fmt, scale=shrunk, zero_point=zero_point)
        assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype]))


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
