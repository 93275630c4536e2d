"""Quantizing whole tensors, against torch, torchao and compressed-tensors."""

import math

import pytest
import torch

from octavo.errors import UserError
from octavo.numerics.codec import decode
from octavo.numerics.qtensor import QTensor, fake_quantize, quantize, quantize_scale
from octavo.spec.element import E2M1, E4M3, E8M0, FP16, INT8, NF4
from octavo.spec.formats import FORMATS, NVFP4, tensor_format
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerFlatGroup,
    PerGroup,
    PerTile,
    Ragged,
    ScaleRule,
    TensorFormat,
    scaled,
)


def random(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


POWERS = [2.0**-7, 2.0**-4, 1.0]


def with_ties(scale: float) -> torch.Tensor:
    return torch.cat([torch.arange(-300, 301) / 2 * scale, random((4000,)) * 60 * scale])


@pytest.mark.parametrize("scale", POWERS)
def test_int8_per_tensor_is_torchs_fake_quantize(scale):
    x = with_ties(scale)
    ours = fake_quantize(x, tensor_format("int8-tensor"), scale=torch.tensor(scale))
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127))


@pytest.mark.parametrize("zero_point", [-128, -7, 0, 100])
@pytest.mark.parametrize("scale", POWERS)
def test_int8_asymmetric_is_torchs_fake_quantize(scale, zero_point):
    x = with_ties(scale)
    points = torch.tensor(zero_point, dtype=torch.int8)
    ours = fake_quantize(x, tensor_format("int8-tensor-asymmetric"), scale=torch.tensor(scale), zero_point=points)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_per_channel_are_torchs_fake_quantize(bits):
    x = random((16, 64)) * 3
    scale = 2.0 ** torch.arange(-8.0, 8.0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(16, dtype=torch.int32), 0, low, high)
    assert torch.equal(fake_quantize(x, tensor_format(f"int{bits}-channel"), scale=scale), theirs)


def test_with_any_scale_torch_differs_by_a_rounding_now_and_then_because_it_multiplies_by_the_reciprocal():
    x = random((100_000,))
    scale = torch.tensor(0.0123)
    ours = fake_quantize(x, tensor_format("int8-tensor"), scale=scale)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -128, 127)
    assert (ours - theirs).abs().max() <= scale * 1.001
    assert (ours != theirs).float().mean() < 1e-4
    exact = (x.double() / scale.double()).round().clamp(-128, 127)
    assert torch.equal(ours, (exact * scale).float())


COMPRESSED = {
    "int4-group32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int8-channel": {"num_bits": 8, "strategy": "channel"},
    "int4-group32-asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "e4m3-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "e4m3-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_with_equal_scales_compressed_tensors_gives_the_same_values(name):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = random((64, 128))
    q = quantize(x, FORMATS[name])
    scale, points = q.scale, q.zero_point
    if "channel" in name:
        scale = scale.unsqueeze(1)
    zeros = torch.zeros_like(scale) if points is None else points
    theirs = forward.fake_quantize(x, scale, zeros, quantization.QuantizationArgs(**COMPRESSED[name]))
    if points is None:
        assert torch.equal(q.dequantize(), theirs)
    else:  # it rounds x / scale + zero_point in one go: fp32 sums differ from ours at ties
        assert (q.dequantize() != theirs).float().mean() < 1e-3


def test_fp8_tiles_agree_with_compressed_tensors_also_where_they_are_not_full():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = random((40, 50))
    q = quantize(x, scaled(E4M3, PerTile(16, 16), ragged=Ragged.PAD))
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 16])
    assert torch.equal(q.dequantize(), forward.fake_quantize(x, q.scale, torch.zeros_like(q.scale), args))


def test_nvfp4_scales_are_torchaos_and_codes_differ_only_by_its_reciprocal():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = random((128, 256)) * random((128, 1), 1).exp()
    q = quantize(x, NVFP4)
    scales, packed = nvfp4.nvfp4_quantize(x, 16, q.scale.scale)
    assert torch.equal(q.scale.codes, scales.view(torch.uint8).view(q.scale.codes.shape))
    theirs = torch.stack([packed & 15, packed >> 4], -1).view(q.codes.shape)
    assert (q.codes != theirs).float().mean() < 1e-4
    torch.testing.assert_close(q.scale.scale, nvfp4.per_tensor_amax_to_scale(x.abs().max()), rtol=2e-7, atol=0)


def test_nvfp4_with_equal_scales_agrees_with_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = random((64, 128))
    q = quantize(x, NVFP4)
    args = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    local = decode(q.scale.codes, E4M3)
    divisor = (1 / q.scale.scale).reshape(1)
    theirs = forward.fake_quantize(x, local, torch.zeros_like(local), args, global_scale=divisor)
    is_equal = (q.dequantize() - theirs).abs() <= 1e-6 * theirs.abs()
    assert is_equal.float().mean() > 0.999, "its divisor is a rounded reciprocal: a tie may fall the other way"


@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
@pytest.mark.parametrize("element", [E4M3, E2M1], ids=lambda e: e.name)
def test_mx_codes_are_torchaos(mode, element):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtype = {E4M3: torch.float8_e4m3fn, E2M1: torch.float4_e2m1fn_x2}[element]
    rule = {"FLOOR": ScaleRule.POWER_FLOOR, "RCEIL": ScaleRule.POWER_CEIL}[mode]
    x = random((64, 128)) * random((64, 1), 1).mul(4).exp2()
    scales, data = mx_tensor.to_mx(x, dtype, 32, getattr(mx_tensor.ScaleCalculationMode, mode))
    q = quantize(x, TensorFormat(element, PerGroup(32), scale=TensorFormat(E8M0), scale_rule=rule))
    assert torch.equal(q.scale.codes, scales.view(torch.uint8))
    data = data.view(torch.uint8)
    theirs = data if element is E4M3 else torch.stack([data & 15, data >> 4], -1).view(q.codes.shape)
    assert torch.equal(q.codes, theirs)


def test_nf4_blocks_agree_with_torchao():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    x = random((64, 64))
    theirs = nf4.NF4Tensor.from_tensor(x, block_size=64, scaler_block_size=64).get_original_weight()
    ours = fake_quantize(x, scaled(NF4, PerFlatGroup(64)))
    # torchao rounds its scales to 8 bits, which moves some values to the next level and all of them a little.
    assert (theirs - ours).abs().mean() < 0.01


def test_a_given_tensor_scale_of_nvfp4_is_kept_and_group_scales_follow_it():
    x = random((4, 64))
    calibrated = torch.tensor(0.01)
    amax = x.unflatten(-1, (4, 16)).abs().amax(-1)
    q = quantize(x, NVFP4, scale=quantize_scale(amax / 6, NVFP4.scale, scale=calibrated))
    assert q.scale.scale is calibrated or torch.equal(q.scale.scale, calibrated)
    theirs = (amax / 6 / calibrated).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.scale.codes, theirs.view(torch.uint8))


def test_a_group_far_below_the_others_keeps_the_smallest_scale_instead_of_none():
    x = torch.cat([torch.full((1, 16), 6000.0), torch.full((1, 16), 0.02), torch.zeros(1, 16)])
    q = quantize(x, NVFP4)
    assert q.scale.codes.flatten().tolist() == [0x7E, 0x01, 0x01]
    assert q.dequantize().isfinite().all()
    assert q.dequantize()[1].abs().sum() > 0


def test_a_scale_of_zero_gives_zeros():
    fmt = TensorFormat(INT8, PerGroup(4), scale=TensorFormat(INT8, PerFlatGroup(256), scale=PLAIN_FP32))
    x = torch.tensor([[1000.0] * 4 + [0.01] * 4])
    q = quantize(x, fmt)
    assert q.scale.codes.tolist() == [[127, 0]]
    assert q.dequantize()[0, 4:].tolist() == [0.0] * 4
    assert torch.equal(q.dequantize(), fake_quantize(x, fmt))


def test_scales_may_be_given_as_numbers_or_as_they_are_stored():
    x = random((4, 64))
    for fmt in (NVFP4, tensor_format("int4-group32"), TensorFormat(INT8, PerGroup(32), scale=TensorFormat(FP16))):
        q = quantize(x, fmt)
        real = q.scale.dequantize() if isinstance(q.scale, QTensor) else q.scale
        assert torch.equal(quantize(x, fmt, scale=q.scale).dequantize(), q.dequantize())
        assert torch.equal(fake_quantize(x, fmt, scale=real), fake_quantize(x, fmt))


def test_zero_points_are_stored_in_a_byte_whatever_dtype_they_were_given_in():
    x, fmt = random((4, 64)), tensor_format("int4-group32-asymmetric")
    q = quantize(x, fmt)
    again = quantize(x, fmt, scale=q.scale, zero_point=q.zero_point.int())
    assert again.zero_point.dtype == torch.int8
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: quantize(x, tensor_format("int4-group64")),
            "choose 4, 6, 8, 12, 16, 24, 32, 48, or leave it out",
        ),
        (lambda x: quantize(x, tensor_format("int8-tensor"), scale=torch.ones(3)), r"scale of shape \(\), not \(3,\)"),
        (lambda x: quantize(x, PLAIN_FP32, scale=torch.ones(())), "takes no scale"),
        (lambda x: quantize(x, tensor_format("int8-tensor-asymmetric"), scale=torch.ones(())), "give both"),
        (lambda x: quantize(x, tensor_format("int8-tensor"), zero_point=torch.ones(())), "give both"),
        (lambda x: fake_quantize(x, NVFP4, scale=torch.ones(())), r"scale of shape \(8, 6\), not \(\)"),
        (lambda x: fake_quantize(x[0, 0], tensor_format("int4-group32")), "single value"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(call, message):
    with pytest.raises(UserError, match=message):
        call(random((8, 96)))


def test_nan_stays_visible_in_simulation():
    x = random((4, 32))
    x[1, 3] = math.nan
    static = fake_quantize(x, tensor_format("int8-tensor"), scale=torch.tensor(0.1))
    assert torch.equal(static.isnan(), x.isnan())
    assert fake_quantize(x, tensor_format("int8-token"))[1].isnan().all()
    assert fake_quantize(x, tensor_format("int8-token"))[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-tensor-asymmetric", "e4m3-token", "nvfp4"])
def test_compiled_rounding_is_one_graph_with_the_same_bits(name):
    fmt = NVFP4 if name == "nvfp4" else tensor_format(name)
    x = random((64, 64))
    compiled = torch.compile(lambda x: fake_quantize(x, fmt), fullgraph=True)
    assert torch.equal(compiled(x), fake_quantize(x, fmt))
