"""Whole formats against programs that share nothing with octavo: onnx's reference evaluator, bitsandbytes, torchao."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.numerics.qtensor import quantize, quantize_scale
from octavo.spec.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, NF4, UINT4, ElementFormat, IntFormat
from octavo.spec.formats import tensor_format
from octavo.spec.tensor_format import PLAIN_FP32, PerChannel, PerFlatGroup, PerGroup, TensorFormat, scaled


def weights(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn((shape[0], 1), generator=generator).exp()


ONNX_TYPES = {
    INT4: "INT4", INT8: "INT8", UINT4: "UINT4", E4M3: "FLOAT8E4M3FN", E5M2: "FLOAT8E5M2", E2M1: "FLOAT4E2M1",
}  # fmt: skip


def through_onnx(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, element: ElementFormat, **where: int):
    """Codes and values that onnx's reference QuantizeLinear and DequantizeLinear give."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, ONNX_TYPES[element])
    initializers = []
    if zero_point is not None:
        initializers = [helper.make_tensor("z", kind, zero_point.shape, zero_point.flatten().tolist())]
    names = ["s", "z"] if initializers else ["s"]
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", *names], ["q"], **where, **({} if initializers else {"output_dtype": kind})
        ),
        helper.make_node("DequantizeLinear", ["q", *names], ["y"], **where),
    ]
    inputs = [helper.make_tensor_value_info(n, 1, a.shape) for n, a in (("x", x), ("s", scale))]
    outputs = [helper.make_tensor_value_info(n, t, x.shape) for n, t in (("q", kind), ("y", 1))]
    graph = helper.make_graph(nodes, "rounding", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    return reference.ReferenceEvaluator(model).run(None, {"x": x, "s": scale})


@pytest.mark.parametrize("granularity", [PerGroup(32), PerChannel()], ids=str)
@pytest.mark.parametrize("element", [INT4, INT8, E4M3, E5M2, E2M1], ids=lambda e: e.name)
def test_blocks_and_channels_are_those_of_onnx(element: ElementFormat, granularity) -> None:
    x = weights((16, 128))
    x[3], x[:, :40:7] = 0, 0
    q = quantize(x, scaled(element, granularity))
    where = {"axis": 1, "block_size": 32} if granularity == PerGroup(32) else {"axis": 0}
    codes, values = through_onnx(x.numpy(), q.scale.numpy(), None, element, **where)
    assert torch.equal(torch.from_numpy(values), q.dequantize())
    stored = codes.astype(np.int8) if isinstance(element, IntFormat) else codes.view(np.int8)
    assert np.array_equal(stored, q.codes.view(torch.int8).numpy())


@pytest.mark.parametrize("element", [INT4, UINT4, INT8], ids=lambda e: e.name)
def test_zero_points_of_blocks_are_those_of_onnx(element) -> None:
    x = weights((16, 128)) + 0.7
    q = quantize(x, scaled(element, PerGroup(32), asymmetric=True))
    _, values = through_onnx(x.numpy(), q.scale.numpy(), q.zero_point.numpy(), element, axis=1, block_size=32)
    assert torch.equal(torch.from_numpy(values), q.dequantize())


def test_nvfp4_is_two_levels_of_onnx() -> None:
    """The group scales as FP8 of a tensor scale, then the values as FP4 of the group scales."""
    x = weights((16, 128))
    q = quantize(x, tensor_format("nvfp4"))
    amax = x.unflatten(-1, (8, 16)).abs().amax(-1) / 6
    codes, scales = through_onnx(amax.numpy(), q.scale.scale.numpy(), None, E4M3)
    assert np.array_equal(codes.view(np.uint8), q.scale.codes.numpy())
    _, values = through_onnx(x.numpy(), scales, None, E2M1, axis=1, block_size=16)
    assert torch.equal(torch.from_numpy(values), q.dequantize())


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


def test_nf4_codes_and_scales_are_bitsandbytes(bitsandbytes) -> None:
    x = weights((192, 320))
    packed, state = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4")
    q = quantize(x, scaled(NF4, PerFlatGroup(64)))
    assert torch.equal(q.scale, state.absmax)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).view(x.shape)
    assert (q.codes != theirs).float().mean() < 1e-4, "it multiplies by a reciprocal: a value may fall the other way"
    torch.testing.assert_close(q.dequantize(), bitsandbytes.dequantize_4bit(packed, state), rtol=1e-6, atol=2e-6)


def test_nf4_with_double_quantization_means_the_same_in_bitsandbytes(bitsandbytes) -> None:
    x = weights((192, 320))
    q = quantize(x, tensor_format("nf4-double-quant"))
    packed, state = bitsandbytes.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(state.state2.code, torch.tensor(q.scale.format.element.values), rtol=0, atol=1e-7)
    torch.testing.assert_close(state.offset, q.scale.offset)
    torch.testing.assert_close(state.state2.absmax, q.scale.scale)
    assert ((state.absmax.int() - q.scale.codes.int()).abs() <= 1).all(), "a tie of its coarser search"
    state.absmax, state.offset, state.state2.absmax = q.scale.codes, q.scale.offset, q.scale.scale
    flat = q.codes.flatten()
    ours = (flat[::2] << 4 | flat[1::2]).view(packed.shape)
    torch.testing.assert_close(bitsandbytes.dequantize_4bit(ours, state), q.dequantize(), rtol=1e-5, atol=1e-5)
    assert (q.dequantize() - x).norm() <= (bitsandbytes.dequantize_4bit(packed, state) - x).norm() * 1.01


@pytest.mark.parametrize(("element", "name"), [(E3M2, "fp6_e3m2"), (E2M3, "fp6_e2m3"), (E5M2, "e5m2")])
def test_the_other_microscaling_formats_are_torchaos(element, name: str) -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtype = torch.float8_e5m2 if name == "e5m2" else name
    x = weights((64, 128))
    try:
        scales, data = mx_tensor.to_mx(x, dtype, 32, mx_tensor.ScaleCalculationMode.FLOOR)
    except (AssertionError, KeyError, NotImplementedError, ValueError) as error:
        pytest.skip(f"this torchao has no {name}: {error}")
    q = quantize(x, tensor_format({"e5m2": "mxfp8-e5m2"}.get(name, f"mx{name.replace('_', '-')}")))
    assert torch.equal(q.scale.codes, scales.view(torch.uint8))
    assert torch.equal(q.codes, data.view(torch.uint8).view(q.codes.shape))


def test_scales_in_eight_bits_cost_little_and_are_bytes() -> None:
    x = weights((64, 512))
    plain, double = (quantize(x, tensor_format(f"int4-group64{suffix}")) for suffix in ("", "-double-quant"))
    assert double.scale.codes.dtype == torch.uint8
    assert plain.nbytes - double.nbytes == 64 * 8 * 3 - 64 * 4  # a byte for four, and a scale for each row
    assert (double.dequantize() - x).norm() < (plain.dequantize() - x).norm() * 1.05
    stored = TensorFormat(INT4, PerGroup(64), PLAIN_FP32)
    assert torch.equal(quantize(x, stored, scale=double.scale.dequantize()).codes, double.codes)
    assert torch.equal(quantize_scale(double.scale.dequantize(), double.format.scale).codes, double.scale.codes)
