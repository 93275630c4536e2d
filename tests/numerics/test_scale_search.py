"""Scale search against searches that try everything."""

import itertools
from dataclasses import replace

import pytest
import torch

from octavo.errors import UserError
from octavo.numerics.qtensor import QTensor, fake_quantize, quantize
from octavo.numerics.scale_search import outer_scale, search_scales
from octavo.numerics.weighting import Weighting
from octavo.spec.element import E2M1, E4M3, E8M0, FP16, INT4, NF4
from octavo.spec.formats import NVFP4, tensor_format
from octavo.spec.tensor_format import PerFlatGroup, PerGroup, PerTile, Ragged, ScaleRule, TensorFormat, scaled

MXFP4 = TensorFormat(E2M1, PerGroup(32), scale=TensorFormat(E8M0), scale_rule=ScaleRule.POWER_FLOOR)


def drawn(shape=(16, 128), seed: int = 0, tails: str = "gauss") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    match tails:
        case "laplace":
            return x * torch.empty(shape).exponential_(generator=generator).sqrt() * 2**0.5
        case "t5":
            chi = torch.randn((5, *shape), generator=generator).square().sum(0)
            return x / (chi / 5).sqrt()
    return x


def gram_of(width: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(width * 3, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.T @ x / len(x)


def relative_mse(x: torch.Tensor, fmt: TensorFormat, found) -> float:
    scale, zero_point = found
    error = fake_quantize(x, fmt, scale=scale, zero_point=zero_point) - x
    return float(error.square().sum() / x.square().sum())


def test_nvfp4_search_finds_the_best_of_all_126_group_scales():
    x, outer = drawn((24, 32)), torch.tensor(0.004)
    scale, _ = search_scales(x, NVFP4, outer=outer)
    assert isinstance(scale, QTensor)
    ours = (quantize(x, NVFP4, scale=scale).dequantize() - x).view(24, 2, 16).square().sum(-1)
    entries = torch.tensor([v for v in E4M3.values if v > 0])
    plain = scaled(E2M1, PerGroup(16))
    every = [
        (fake_quantize(x, plain, scale=torch.full((24, 2), float(v * outer))) - x).view(24, 2, 16).square().sum(-1)
        for v in entries
    ]
    torch.testing.assert_close(ours, torch.stack(every).amin(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("tails", "bound"), [("gauss", 0.0067), ("laplace", 0.0069), ("t5", 0.0069)], ids=lambda value: str(value)
)
def test_nvfp4_errs_a_quarter_less_than_the_amax_rule(tails, bound):
    x = drawn((256, 1024), tails=tails)
    error = relative_mse(x, NVFP4, search_scales(x, NVFP4))
    assert error <= bound
    assert error < 0.81 * float((fake_quantize(x, NVFP4) - x).square().sum() / x.square().sum())


def test_nvfp4_errs_less_than_four_over_six():
    x = drawn((64, 512))
    outer = x.abs().max() / (6 * 256)
    tops = x.view(64, 32, 16).abs().amax(-1)
    tried = []
    for top in (6.0, 4.0):
        scale = quantize(tops / top, NVFP4.scale, scale=outer)
        tried.append((fake_quantize(x, NVFP4, scale=scale) - x).view(64, 32, 16).square().sum(-1))
    four_over_six = float(torch.minimum(*tried).sum() / x.square().sum())
    assert relative_mse(x, NVFP4, search_scales(x, NVFP4)) < 0.93 * four_over_six


@pytest.mark.parametrize("name", ["int4-group32", "int4-group128", "int3-group32"])
def test_integer_scales_are_within_a_hundredth_of_the_best_of_a_thousand(name):
    fmt, x = tensor_format(name), drawn((8, 256), tails="laplace")
    first = quantize(x, fmt).scale
    best = torch.full_like(first, torch.inf)
    width = 256 // first[0].numel()
    for factor in torch.linspace(0.3, 1.3, 1000).tolist():
        error = fake_quantize(x, fmt, scale=first * factor) - x
        best = torch.minimum(best, error.view(*first.shape, width).square().sum(-1))
    ours = fake_quantize(x, fmt, scale=search_scales(x, fmt)[0]) - x
    assert ours.square().sum() <= 1.01 * best.sum()


def test_asymmetric_ranges_beat_the_extremes_and_their_zero_points_are_codes():
    fmt, x = tensor_format("int4-group32-asymmetric"), drawn(tails="laplace") + 0.7
    found = search_scales(x, fmt)
    assert found[1].dtype is torch.int8
    assert relative_mse(x, fmt, found) < 0.93 * float((fake_quantize(x, fmt) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, tensor_format("int4-group32"), scaled(NF4, PerGroup(32))], ids=str)
def test_each_measure_is_best_by_its_own_measure(fmt):
    x, gram = drawn((32, 64)), gram_of(64)
    size = fmt.granularity.size
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, 64, size)])
    weightings = {
        "plain": Weighting(),
        "importance": Weighting(importance=gram.diagonal()),
        "gram": Weighting(gram=gram),
    }

    def costs(found) -> dict[str, float]:
        error = (fake_quantize(x, fmt, scale=found[0]) - x).view(32, -1, size)
        return {
            "plain": float(error.square().sum()),
            "importance": float((error.square() * gram.diagonal().view(-1, size)).sum()),
            "gram": float(torch.einsum("ngs,gst,ngt->", error, blocks, error)),
        }

    rows = {name: costs(search_scales(x, fmt, weighting)) for name, weighting in weightings.items()}
    for judged, other in itertools.permutations(rows, 2):
        assert rows[judged][judged] <= rows[other][judged] * 1.01


def test_negative_scales_use_the_code_that_has_no_opposite():
    plain, full = tensor_format("int4-group128"), tensor_format("int4-group128-full-range")
    x = drawn((64, 512))
    found = search_scales(x, full)
    assert (found[0] < 0).any()
    assert relative_mse(x, full, found) < min(0.0095, 0.95 * relative_mse(x, plain, search_scales(x, plain)))


def test_scores_are_of_the_scale_as_stored():
    fmt = TensorFormat(INT4, PerGroup(32), scale=TensorFormat(FP16))
    scale, _ = search_scales(drawn() * 1e-3, fmt)
    values = scale if isinstance(scale, torch.Tensor) else scale.dequantize()
    torch.testing.assert_close(values, values.half().float(), rtol=0, atol=0)


def test_the_outer_scale_leaves_room_for_the_largest_block():
    x = torch.full((1, 16), 4.0)
    x[0, 0] = 4.1
    scale, _ = search_scales(x, NVFP4)
    assert isinstance(scale, QTensor)
    assert scale.scale == outer_scale(torch.tensor(4.1), NVFP4)
    assert float(scale.dequantize()) > 4.1 / 6


EVERY_KIND = [
    NVFP4,
    MXFP4,
    *map(tensor_format, ("int8-tensor", "int8-channel", "int4-group128", "int3-group32-asymmetric", "e4m3-channel")),
]


@pytest.mark.parametrize("fmt", EVERY_KIND, ids=str)
def test_nothing_breaks_the_search(fmt):
    for x in (
        torch.zeros(4, 256),
        torch.zeros(4, 256).index_fill(1, torch.tensor([3]), 1.0),
        drawn((4, 256)).bfloat16(),
        drawn((4, 256)).clamp(-1, 1) * 1e37,
        drawn((4, 256)) * 1e-30,
        torch.zeros(0, 256),
    ):
        scale, zero_point = search_scales(x, fmt, Weighting(importance=torch.zeros(256)))
        found = fake_quantize(x.float(), fmt, scale=scale, zero_point=zero_point)
        plain = fake_quantize(x.float(), fmt)
        assert found.isfinite().all()
        # in fp64: squares of huge and of tiny values leave fp32
        error, bound = (found - x.float()).double(), (plain - x.float()).double()
        assert error.square().sum() <= bound.square().sum() * 1.001 + 1e-90


def test_flat_groups_and_tiles_are_searched_too():
    x = drawn((48, 80))
    padded = replace(scaled(INT4, PerTile(16, 32)), ragged=Ragged.PAD)
    for fmt in (scaled(NF4, PerFlatGroup(64)), scaled(E4M3, PerTile(24, 40)), padded):
        found = search_scales(x, fmt)
        assert relative_mse(x, fmt, found) <= float((fake_quantize(x, fmt) - x).square().sum() / x.square().sum())


def test_a_centred_format_is_refused():
    fmt = TensorFormat(INT4, PerGroup(32), scale=TensorFormat(FP16), offset=TensorFormat(FP16))
    with pytest.raises(UserError, match="without offsets"):
        search_scales(drawn(), fmt)
