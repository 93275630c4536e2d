"""Conversions between stored formats: exact where the target's grid holds the values, and honest where it does not."""

import pytest
import torch

from octavo.errors import UserError
from octavo.numerics.conversions import convert
from octavo.numerics.qtensor import quantize
from octavo.spec.formats import FORMATS, tensor_format
from octavo.spec.tensor_format import PLAIN_FP32

SHAPE = (24, 256)


def weights(seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn((SHAPE[0], 1), generator=generator) * spread
    return torch.randn(SHAPE, generator=generator) * sizes.exp2()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("mxfp4", "nvfp4"),
        ("mxfp4-ceil", "nvfp4"),
        ("mxfp4", "mxfp6-e3m2"),
        ("mxfp4", "mxfp8"),
        ("int4-group128", "int8-group128"),
        ("int4-group128", "int8-group32"),
        ("int4-group64-asymmetric", "int8-group64"),
        ("int4-group64-asymmetric", "int8-group64-asymmetric"),
        ("int4-group64-full-range", "int8-group64"),
        ("int4-channel", "int8-channel"),
        ("int8-group128", "int8-group32"),
        ("e4m3-channel", "e4m3-group64"),
    ],
)
def test_a_finer_grid_keeps_every_value(source: str, target: str) -> None:
    old = quantize(weights(), tensor_format(source))
    found = convert(old, target)
    assert found.is_exact
    assert found.relative_error == 0
    assert not found.changed.any()
    assert found.tensor.format == tensor_format(target)
    assert torch.equal(found.tensor.dequantize(), old.dequantize())


def test_mxfp4_keeps_its_very_codes_in_nvfp4() -> None:
    old = quantize(weights(), tensor_format("mxfp4"))
    new = convert(old, "nvfp4").tensor
    assert torch.equal(new.codes, old.codes)
    assert torch.equal(new.scale.dequantize(), old.scale.dequantize().repeat_interleave(2, -1))


@pytest.mark.parametrize("width", [17, 18, 30])
def test_mxfp4_is_exact_in_nvfp4_up_to_18_powers_of_two_and_says_which_groups_are_not(width: int) -> None:
    x = torch.zeros(2, 64)
    x[0, :32] = torch.tensor([6.0, 0.5] * 16)
    x[1, 32:] = torch.tensor([6.0, 0.5] * 16) * 2.0**-width
    found = convert(quantize(x, tensor_format("mxfp4")), "nvfp4")
    assert found.is_exact == (width <= 17)
    assert found.changed.nonzero().tolist() == ([] if width <= 17 else [[1, 2], [1, 3]])
    if width == 18:  # half of 6 is there, half of the smallest is not
        assert found.num_changed == 16
        assert 0 < found.relative_error < 1e-5


@pytest.mark.parametrize("exponent", [-120, 0, 110])
def test_mxfp4_is_exact_in_nvfp4_at_either_end_of_its_range(exponent: int) -> None:
    x = weights(spread=0.5) * 2.0**exponent
    found = convert(quantize(x, tensor_format("mxfp4")), "nvfp4")
    assert found.is_exact


def test_fp8_tiles_that_differ_by_powers_of_two_are_exact_per_channel() -> None:
    x = torch.full((128, 256), 1.0)
    x[:, :128] *= 2.0**-4
    assert convert(quantize(x, tensor_format("e4m3-tile128x128")), "e4m3-channel").is_exact


def test_fp8_tiles_to_fp8_channels_rounds_once_more_and_says_so() -> None:
    x = torch.randn((256, 512), generator=torch.Generator().manual_seed(0))
    tiles = tensor_format("e4m3-tile128x128")
    old = quantize(x, tiles)
    found = convert(old, "e4m3-channel")
    direct = quantize(old.dequantize(), tensor_format("e4m3-channel"))
    error = (found.tensor.dequantize() - old.dequantize()).norm() / old.dequantize().norm()
    assert found.relative_error == pytest.approx(float(error), rel=1e-5)
    assert 0 < found.relative_error < 0.03
    assert error <= (direct.dequantize() - old.dequantize()).norm() / old.dequantize().norm()
    assert found.num_changed == (found.tensor.dequantize() != old.dequantize()).sum()


@pytest.mark.parametrize("target", ["int8-group64", "nvfp4", "int4-group32-asymmetric", "nf4-double-quant"])
def test_converting_is_never_worse_than_rounding_the_values_again(target: str) -> None:
    for name, source in FORMATS.items():
        old = quantize(weights(), source)
        values, found = old.dequantize(), convert(old, target)
        again = quantize(values, tensor_format(target)).dequantize()
        assert found.relative_error <= (again.double() - values).norm() / values.double().norm() + 1e-9, name


def test_a_format_converts_to_itself_exactly() -> None:
    old = quantize(weights(), tensor_format("nf4-double-quant"))
    assert convert(old, "nf4-double-quant").tensor is old


def test_zeros_convert() -> None:
    assert convert(quantize(torch.zeros(4, 64), tensor_format("mxfp4")), "nvfp4").is_exact


def test_a_plain_format_is_refused() -> None:
    with pytest.raises(UserError, match="dequantize"):
        convert(quantize(weights(), tensor_format("mxfp4")), PLAIN_FP32)
