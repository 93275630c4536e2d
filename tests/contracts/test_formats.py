"""The battery that every tensor format passes. A new entry of the catalogue is picked up by itself."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from octavo.numerics.packing import pack
from octavo.numerics.qtensor import QTensor, fake_quantize, quantize
from octavo.numerics.scaling import expand_scale, from_blocks, to_blocks
from octavo.spec.element import (
    BF16,
    E2M1,
    E4M3,
    FP16,
    INT4,
    INT8,
    INT8_NARROW,
    UINT4,
    CodebookFormat,
    IntFormat,
)  # fmt: skip
from octavo.spec.formats import FORMATS
from octavo.spec.tensor_format import (
    PLAIN_FP32,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Ragged,
    TensorFormat,
    scaled,
)  # fmt: skip

BEYOND = {
    "fp8-tiles": scaled(E4M3, PerTile(24, 40), ragged=Ragged.PAD),
    "thirds": TensorFormat(CodebookFormat("thirds", (-1.0, -1 / 3, 0.0, 1 / 3, 1.0)), PerGroup(32), scale=PLAIN_FP32),
    "int8-scales-from": TensorFormat(INT8, PerToken(), scale=PLAIN_FP32, min_scale=1e-3),
    "int4-beyond-top": TensorFormat(INT4, PerGroup(32), scale=PLAIN_FP32, top=7.5),
    "three levels": TensorFormat(
        E2M1, PerGroup(8), TensorFormat(E4M3, PerGroup(4), TensorFormat(E4M3, PerTensor(), PLAIN_FP32))
    ),
    "int8-narrow": scaled(INT8_NARROW, PerChannel(0)),
    "uint4": scaled(UINT4, PerGroup(32), asymmetric=True),
    "int4-padded": TensorFormat(INT4, PerGroup(40), scale=PLAIN_FP32, zero_point=INT4, ragged=Ragged.PAD),
    "int4-fp16-scales": TensorFormat(INT4, PerGroup(32), scale=TensorFormat(FP16)),
    "int4-centred": TensorFormat(INT4, PerGroup(32), scale=PLAIN_FP32, offset=TensorFormat(BF16)),
    "fp16": TensorFormat(FP16),
    "fp32": PLAIN_FP32,
}
EVERY = {**FORMATS, **BEYOND}
SCALED = {name: fmt for name, fmt in EVERY.items() if not fmt.is_plain}
every_format = pytest.mark.parametrize("fmt", EVERY.values(), ids=EVERY.keys())
every_scaled = pytest.mark.parametrize("fmt", SCALED.values(), ids=SCALED.keys())


def scaled_formats(having: Callable[[TensorFormat], bool]) -> pytest.MarkDecorator:
    """Run on the scaled formats of which the law holds."""
    chosen = {name: fmt for name, fmt in SCALED.items() if having(fmt)}
    return pytest.mark.parametrize("fmt", chosen.values(), ids=chosen.keys())


SHAPE = (12, 128)


def weights(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn((*shape[:-1], 1), generator=generator).exp()


def awkward() -> dict[str, torch.Tensor]:
    """Tensors that have broken quantizers."""
    some_zero = weights()
    some_zero[2:5] = 0
    return {
        "plain": weights(),
        "bf16": weights().bfloat16(),
        "fp16": weights().half(),
        "fp64": weights().double(),
        "zeros": torch.zeros(SHAPE),
        "some rows zero": some_zero,
        "positive": weights().abs() + 5,
        "negative": -weights().abs() - 5,
        "subnormal": weights() * 1e-39,
        "tiniest": torch.full(SHAPE, 1e-45),
        "huge": weights().clamp(-1, 1) * 1.6e38,
        "transposed": weights(SHAPE[::-1]).T,
        "strided": weights((12, 256))[:, ::2],
        "expanded": weights()[:1].expand(SHAPE),
        "experts": weights((3, 4, 128)),
        "vector": weights().flatten()[:128],
        "one row": weights((1, 128)),
        "no rows": torch.zeros(0, 128),
    }


AWKWARD = awkward()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def fits(fmt: TensorFormat, x: torch.Tensor) -> bool:
    return fmt.misfit(tuple(x.shape)) is None


@every_format
def test_simulation_and_codes_give_the_same_bits_for_any_tensor(fmt):
    for name, x in AWKWARD.items():
        if not fits(fmt, x):
            continue
        before = x.clone()
        q, simulated = quantize(x, fmt), fake_quantize(x, fmt)
        assert (simulated.dtype, simulated.shape) == (x.dtype, x.shape), name
        q.dequantize().zero_()
        assert torch.equal(bits(q.dequantize(x.dtype)), bits(simulated)), f"{name}: or reading changed the codes"
        assert torch.equal(bits(x), bits(before)), f"{name}: the input was overwritten"
        assert simulated.isfinite().all(), name
        assert q.codes.shape == x.shape, name


@every_format
def test_stored_bytes_are_those_of_the_packed_tensors(fmt):
    for name, x in AWKWARD.items():
        if fits(fmt, x):
            q, shape = quantize(x, fmt), tuple(x.shape)
            assert q.nbytes == fmt.stored_bytes(shape) == packed_bytes(q), name
            assert fmt.bits_per_element(shape) == 8 * q.nbytes / max(1, x.numel()), name


def packed_bytes(q: QTensor) -> int:
    """Of tensors that are really packed."""
    total = pack(q.codes, q.format.element.bits).nbytes if q.format.element.bits <= 8 else q.codes.nbytes
    if q.zero_point is not None:
        points = q.zero_point if q.zero_point.ndim else q.zero_point.reshape(1)
        total += pack(points, q.format.zero_point.bits).nbytes
    for part in (q.scale, q.offset):
        total += 0 if part is None else packed_bytes(part) if isinstance(part, QTensor) else part.nbytes
    return total


def value_of(part) -> torch.Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part


@every_scaled
def test_no_representable_value_is_nearer(fmt):
    x = weights()
    q = quantize(x, fmt)
    blocks, _ = to_blocks(x.double(), fmt.granularity)

    def expanded(part):
        return expand_scale(value_of(part).double(), fmt.granularity, SHAPE).unsqueeze(-1)

    grid = torch.tensor(fmt.element.values, dtype=torch.float64)
    if q.zero_point is not None:
        grid = grid - expanded(q.zero_point)
    grid = grid * expanded(q.scale)
    if q.offset is not None:
        grid = grid + expanded(q.offset)
    nearest = from_blocks((blocks.unsqueeze(-1) - grid).abs().amin(-1), fmt.granularity, SHAPE)
    error = (q.dequantize().double() - x.double()).abs()
    # fp32 arithmetic: the quotient near a tie and the final product are each off by half an ulp.
    assert (error <= nearest + x.abs() * 2.0**-22 + 2.0**-22 * (error + 1e-30)).all()


@scaled_formats(having=lambda fmt: fmt.offset is None)
def test_quantizing_again_with_the_same_scales_changes_nothing(fmt):
    q = quantize(weights(), fmt)
    again = quantize(q.dequantize(), fmt, scale=q.scale, zero_point=q.zero_point)
    assert torch.equal(again.dequantize(), q.dequantize())


@scaled_formats(having=lambda fmt: fmt.scale.element != FP16 and not fmt.min_scale)
@pytest.mark.parametrize("power", [-20, 3, 30])
def test_scaling_by_a_power_of_two_scales_the_result(fmt, power):
    x = weights()
    assert torch.equal(fake_quantize(x * 2.0**power, fmt), fake_quantize(x, fmt) * 2.0**power)


def has_mirrored_values(fmt: TensorFormat) -> bool:
    return fmt.is_symmetric and not isinstance(fmt.element, CodebookFormat) and (fmt.top or 0) <= fmt.element.max


@scaled_formats(having=has_mirrored_values)
def test_negating_negates(fmt):
    x = weights()
    assert torch.equal(fake_quantize(-x, fmt), -fake_quantize(x, fmt))


@scaled_formats(having=lambda fmt: fmt.scale.is_plain)
def test_a_block_does_not_feel_its_neighbours(fmt):
    x = weights()
    louder = x.clone()
    louder[7, 70] *= 1000
    changed = (fake_quantize(louder, fmt) != fake_quantize(x, fmt)).nonzero()
    blocks, dims = to_blocks(torch.arange(x.numel()).view(SHAPE), fmt.granularity)
    own = (blocks == 7 * SHAPE[1] + 70).nonzero()[0].tolist()
    index = [slice(None) if i - blocks.ndim in dims or i in dims else own[i] for i in range(blocks.ndim)]
    members = set(blocks[tuple(index)].flatten().tolist())
    assert {(i * SHAPE[1] + j) in members for i, j in changed.tolist()} <= {True}


def keeps_experts_apart(fmt: TensorFormat) -> bool:
    return isinstance(fmt.granularity, PerToken | PerGroup | PerTile) or fmt.granularity == PerChannel(-2)


@scaled_formats(having=lambda fmt: keeps_experts_apart(fmt) and fmt.scale.is_plain)
def test_experts_are_quantized_like_separate_matrices(fmt):
    x = weights((3, 16, 128))
    assert torch.equal(fake_quantize(x, fmt), torch.stack([fake_quantize(expert, fmt) for expert in x]))


@scaled_formats(having=lambda fmt: fmt.offset is None)
def test_zero_is_exact(fmt):
    x = weights()
    x[:, ::3] = 0
    assert (fake_quantize(x, fmt)[:, ::3] == 0).all()


@scaled_formats(having=lambda fmt: isinstance(fmt.element, IntFormat) and fmt.element.bits < 8)
def test_more_bits_hurt_less(fmt):
    wider = IntFormat("wider", fmt.element.bits + 1, is_signed=fmt.element.is_signed)
    better = TensorFormat(
        wider, fmt.granularity, fmt.scale, fmt.offset, wider if fmt.zero_point else None, fmt.scale_rule, fmt.ragged
    )
    x = weights()
    assert (fake_quantize(x, better) - x).norm() < (fake_quantize(x, fmt) - x).norm()


@every_format
def test_a_format_survives_json(fmt):
    assert TensorFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


@every_format
def test_gradients_are_left_to_the_caller(fmt):
    x = weights().requires_grad_()
    assert not fake_quantize(x, fmt).requires_grad
    assert not quantize(x, fmt).dequantize().requires_grad


def test_tokens_and_groups_of_the_whole_row_are_the_same():
    x = weights()
    by_token = fake_quantize(x, scaled(INT8, PerToken()))
    assert torch.equal(by_token, fake_quantize(x, scaled(INT8, PerGroup(128))))
    assert torch.equal(by_token, fake_quantize(x, scaled(INT8, PerChannel())))
    assert torch.equal(by_token, fake_quantize(x, scaled(INT8, PerTile(1, 128))))
    assert math.isfinite(by_token.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    different = []
    for name, fmt in EVERY.items():
        for kind, x in AWKWARD.items():
            if fits(fmt, x):
                here, there = quantize(x, fmt).dequantize(), quantize(x.cuda(), fmt).dequantize().cpu()
                simulated = fake_quantize(x, fmt), fake_quantize(x.cuda(), fmt).cpu()
                if not torch.equal(bits(here), bits(there)):
                    different.append(("stored", name, kind))
                if not torch.equal(*map(bits, simulated)):
                    different.append(("simulated", name, kind))
    assert not different


ANY_SIZE = arrays(np.float32, (2, 128), elements=st.floats(-(2.0**100), 2.0**100, width=32), fill=st.just(0.0))


@given(values=ANY_SIZE)
@settings(max_examples=12, deadline=None)
def test_order_is_kept_and_nothing_leaves_the_range(values):
    """Values that share a scale and are sorted stay sorted, keep their sign, and none exceeds the largest by a step."""
    for name, fmt in SCALED.items():
        if fmt.offset is not None or isinstance(fmt.granularity, PerTile | PerChannel):
            continue
        x = torch.from_numpy(values.copy())
        blocks, dims = to_blocks(x, fmt.granularity)
        if dims == (-1,):
            x = from_blocks(blocks.sort(-1).values, fmt.granularity, tuple(x.shape))
        else:
            x = x.flatten().sort().values.view(x.shape)
        q = fake_quantize(x, fmt)
        assert q.isfinite().all(), name
        rows = to_blocks(q, fmt.granularity)[0] if dims == (-1,) else q.flatten()
        assert (rows.diff(dim=-1) >= 0).all(), name
        if not isinstance(fmt.element, CodebookFormat) or 0.0 in fmt.element.values:
            assert (q * x.sign() >= 0).all(), name
        assert q.abs().max() <= x.abs().max() * 2.01 + 1e-30, name


@given(values=ANY_SIZE)
@settings(max_examples=12, deadline=None)
def test_rounding_twice_on_the_same_scales_is_rounding_once(values):
    x = torch.from_numpy(values.copy())
    for name, fmt in SCALED.items():
        if fmt.offset is None:
            q = quantize(x, fmt)
            again = quantize(q.dequantize(), fmt, scale=q.scale, zero_point=q.zero_point)
            assert torch.equal(again.dequantize(), q.dequantize()), name
