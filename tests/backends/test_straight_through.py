"""The operator of simulation in graphs: its gradient, its shape function, its place under torch's transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.backends.simulate import fake_quantize, format_key, range_of
from octavo.spec.formats import FORMATS, NVFP4


def straight_through(x: Tensor, scale: Tensor, low: float, high: float, zero_point: float = 0.0) -> Tensor:
    """LSQ (arXiv:1902.08153), equation 3: rounding is the identity for gradients, clipping is a clip."""
    codes = (x / scale + zero_point).clamp(low, high)
    return (codes + (codes.round() - codes).detach() - zero_point) * scale


def gradient(y: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
    return found


@pytest.mark.parametrize(
    ("name", "zero_point"), [("int8-tensor", None), ("int4-tensor", None), ("int8-tensor-asymmetric", -20)]
)
def test_integer_gradients_are_those_of_a_clipped_straight_through_estimate(name: str, zero_point: int | None) -> None:
    fmt = FORMATS[name]
    torch.manual_seed(0)
    x = (torch.randn(7, 32) * 3).requires_grad_()
    scale = torch.tensor(0.1 if "int8" in name else 0.5)
    point = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
    ours = fake_quantize(x * 1.0, format_key(fmt), scale, point)
    theirs = straight_through(x, scale, fmt.element.min, fmt.element.max, zero_point or 0)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(gradient(ours, x), gradient(theirs, x), atol=1e-6)


def test_integer_gradients_are_those_of_torch_fake_quantize() -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 64) * 4).requires_grad_()
    scale = torch.tensor(0.02)
    ours = gradient(fake_quantize(x, format_key(FORMATS["int8-tensor"]), scale), x)
    theirs = gradient(torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127), x)
    edge = ((x / scale).round() - x / scale).abs() > 0.4  # torch asks the rounded code, the papers the unrounded one
    assert torch.equal(ours[~edge], theirs[~edge])


def test_per_channel_gradients_use_each_channel_s_own_range() -> None:
    x = torch.tensor([[0.5, 2.0], [0.5, 2.0]], requires_grad=True)
    scale = torch.tensor([1 / 127, 10 / 127])
    y = fake_quantize(x, format_key(FORMATS["int8-channel"]), scale)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("name", ["e4m3-tensor", "e5m2-tensor"])
def test_float_gradients_are_one_inside_and_zero_outside(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.tensor([0.0, 1.0, fmt.element.max, fmt.element.max * 1.1, -fmt.element.max * 2], requires_grad=True)
    y = fake_quantize(x, format_key(fmt), torch.tensor(1.0))
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["int8-token", "e4m3-token", "int4-group32", "int8-tensor-asymmetric"])
def test_dynamic_gradients_are_the_identity(name: str) -> None:
    x = torch.randn(4, 32, requires_grad=True)
    y = fake_quantize(x, format_key(FORMATS[name]), None)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(4, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_keep_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype).requires_grad_()
    y = fake_quantize(x, format_key(FORMATS["int8-tensor"]), torch.tensor(0.01))
    assert y.dtype == dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-tensor", "int4-group32", "int8-channel-asymmetric"])
def test_torch_finds_the_operator_well_registered(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.randn(4, 32)
    scale, zero_point = range_of(x, fmt)
    for inputs in ((x, scale, zero_point), (x.clone().requires_grad_(), scale, zero_point), (x, None, None)):
        arguments = (*inputs, format_key(fmt))
        torch.library.opcheck(torch.ops.octavo.fake_quantize.default, arguments)


def test_what_no_backend_takes_is_computed_by_numerics() -> None:
    from octavo.numerics import qtensor

    x = torch.randn(3, 32)
    assert torch.equal(fake_quantize(x, format_key(NVFP4), None), qtensor.fake_quantize(x, NVFP4))


def test_a_format_survives_its_key() -> None:
    from octavo.backends.simulate import _format

    for fmt in (*FORMATS.values(), NVFP4):
        assert _format(format_key(fmt)) == fmt
