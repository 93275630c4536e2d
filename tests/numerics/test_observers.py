"""Static ranges: independent of order and partition, and what each observer promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import UserError
from octavo.numerics.histogram import NUM_BINS, Histogram
from octavo.numerics.observers import NotFiniteError, make_observer
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scaling import scale_from_range
from octavo.spec.formats import NVFP4, tensor_format
from octavo.spec.plan import ObserverSpec

NAMES = ["absmax", "percentile", "mse", "entropy"]
FORMATS = ["int8-tensor", "int8-tensor-asymmetric", "int4-tensor", "e4m3-tensor"]
every_observer = pytest.mark.parametrize("name", NAMES)
every_format = pytest.mark.parametrize("fmt", [tensor_format(name) for name in FORMATS], ids=FORMATS)


def heavy_tailed(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp() + 0.3


def observed(name: str, fmt, *parts: torch.Tensor, percentile: float = 99.99):
    observer = make_observer(ObserverSpec(name, percentile), fmt)
    for part in parts:
        observer.update(part)
    return observer


def found_range(name: str, fmt, x: torch.Tensor, **options) -> tuple[float, float]:
    low, high = observed(name, fmt, x, **options).range()
    return low.item(), high.item()


@every_observer
@every_format
def test_order_partition_and_merging_do_not_matter(name, fmt):
    x = heavy_tailed(30_000)
    x[20_000:] *= 50  # the histogram has to widen on the way
    whole = observed(name, fmt, x)
    parts = observed(name, fmt, *x.flip(0).view(100, 300).split(7))
    merged = observed(name, fmt, x[:11_111])
    merged.merge(observed(name, fmt, x[11_111:]))
    backwards = observed(name, fmt, x[11_111:])
    backwards.merge(observed(name, fmt, x[:11_111]))
    backwards.merge(observed(name, fmt))
    for other in (parts, merged, backwards):
        assert other.count == whole.count == x.numel()
        assert other.range() == whole.range()


@given(st.lists(st.lists(st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)), min_size=1, max_size=5))
@settings(max_examples=60)
def test_merged_histograms_count_like_one_that_saw_everything(parts):
    # Values whose ratio to the largest leaves fp32 altogether would be flushed to zero when they are binned.
    parts = [torch.tensor([v for v in part if v == 0 or abs(v) > 2.0**-60], dtype=torch.float32) for part in parts]
    whole, merged = Histogram(), Histogram()
    whole.update(torch.cat(parts))
    for part in parts:
        own = Histogram()
        own.update(part)
        merged.merge(own)
    assert torch.equal(merged.counts, whole.counts)
    assert (merged.exponent, merged.low, merged.high) == (whole.exponent, whole.low, whole.high)
    assert merged.count == whole.count == whole.counts.sum()


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1))
def test_every_value_is_within_half_a_bin_of_its_middle_and_the_largest_in_the_upper_half(values):
    x = torch.tensor(values, dtype=torch.float32)
    histogram = Histogram()
    histogram.update(x)
    middles = histogram.centres.double().repeat_interleave(histogram.counts)
    assert (middles - x.double().sort().values).abs().max() <= histogram.width / 2
    if histogram.amax >= 2.0**-100:
        assert NUM_BINS / 2 <= histogram.amax / histogram.width <= NUM_BINS


@every_observer
@every_format
def test_a_range_is_never_wider_than_what_was_seen(name, fmt):
    x = heavy_tailed(5000)
    low, high = found_range(name, fmt, x)
    assert x.min() <= low <= 0 <= high <= x.max()
    low, high = found_range(name, fmt, x.relu())
    assert low == 0
    assert 0 < high <= x.max()


@every_format
def test_absmax_is_the_exact_range(fmt):
    x = heavy_tailed(5000)
    assert found_range("absmax", fmt, x) == (x.min().item(), x.max().item())


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_within_a_bin(percentile):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + 0.3
    bin_width = 2 * x.abs().max().item() / NUM_BINS
    low, high = found_range("percentile", tensor_format("int8-tensor"), x, percentile=percentile)
    assert max(-low, high) == pytest.approx(
        np.percentile(x.abs().numpy(), percentile, method="inverted_cdf"), abs=bin_width
    )
    low, high = found_range("percentile", tensor_format("int8-tensor-asymmetric"), x, percentile=percentile)
    assert high == pytest.approx(np.percentile(x.numpy(), 50 + percentile / 2), abs=bin_width)
    assert low == pytest.approx(np.percentile(x.numpy(), 50 - percentile / 2), abs=bin_width)


def squared_error(x: torch.Tensor, fmt, low: float, high: float) -> float:
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), fmt)
    return (fake_quantize(x, fmt, scale=scale, zero_point=zero_point) - x).double().square().sum().item()


@every_format
def test_mse_is_as_good_as_brute_force_on_the_values_themselves(fmt):
    x = heavy_tailed(20_000)
    found = squared_error(x, fmt, *found_range("mse", fmt, x))
    ends = np.linspace(0.05, 1, 40)
    if fmt.is_symmetric:
        candidates = [(-top, top) for top in ends * x.abs().max().item()]
    else:
        candidates = [(i * x.min().item(), j * x.max().item()) for i in ends[::2] for j in ends[::2]]
    assert found <= 1.01 * min(squared_error(x, fmt, low, high) for low, high in candidates)


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
@pytest.mark.parametrize("fmt", [tensor_format(n) for n in ("int8-tensor", "int4-tensor")], ids=str)
def test_searches_clip_a_lonely_outlier_and_serve_the_rest(name, fmt):
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([60.0])])
    low, high = found_range(name, fmt, x)
    assert max(-low, high) < 45
    assert squared_error(x[:-1], fmt, low, high) < squared_error(x[:-1], fmt, -60, 60) / 2


def test_entropy_agrees_with_the_procedure_it_is_taken_from():
    """Migacz' pseudo-code, literally, on a histogram of 2048 bins and 128 levels, against ours on the same data."""
    generator = torch.Generator().manual_seed(1)
    bulk = torch.randn(400_000, generator=generator)
    for x in (bulk * torch.randn(400_000, generator=generator).exp(), torch.cat([bulk, bulk[:40] * 20])):
        low, high = found_range("entropy", tensor_format("int8-tensor"), x)
        assert max(-low, high) == pytest.approx(tensorrt_threshold(x.abs().numpy()), rel=0.2)
        assert max(-low, high) < x.abs().max() / 2, "the comparison is about clipping"


def test_entropy_agrees_with_onnxruntime():
    """Its calibrator with bins enough to choose among; with its default of 128 it keeps the whole range."""
    collector = pytest.importorskip("onnxruntime.quantization.calibrate").HistogramCollector
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(2))
    x = torch.cat([x, x[:20] * 12])
    found = {}
    for bins in (128, 1023):
        theirs = collector("entropy", False, bins, 128, 99.999, "same")
        theirs.collect({"x": [x.numpy()]})
        found[bins] = max(map(abs, map(float, theirs.compute_collection_result()["x"][:2])))
    low, high = found_range("entropy", tensor_format("int8-tensor"), x)
    assert max(-low, high) == pytest.approx(found[1023], rel=0.1)
    assert found[128] == pytest.approx(float(x.abs().max()), rel=0.05) != pytest.approx(found[1023], rel=0.5)


def tensorrt_threshold(magnitudes: np.ndarray) -> float:
    counts, edges = np.histogram(magnitudes, bins=2048)
    best, threshold = math.inf, 0.0
    for i in range(128, 2049, 8):
        reference = counts[:i].astype(float)
        reference[-1] += counts[i:].sum()
        quantized = np.zeros(i)
        for level in np.array_split(np.arange(i), 128):
            filled = counts[level] > 0
            if filled.any():
                quantized[level[filled]] = counts[level].sum() / filled.sum()
        p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1)
        used = p > 0
        divergence = np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-9)))
        if divergence < best:
            best, threshold = divergence, edges[i]
    return threshold


@every_observer
@every_format
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_scaling_the_data_by_a_power_of_two_scales_the_range(name, fmt, scale):
    x = heavy_tailed(3000)
    low, high = found_range(name, fmt, x)
    assert found_range(name, fmt, x * scale) == (low * scale, high * scale)


@every_observer
@every_format
def test_constant_and_zero_data_have_a_range_that_works(name, fmt):
    for value in (0.0, 3.0, -3.0, 1e-45, 3e38):
        low, high = observed(name, fmt, torch.full((100,), value)).range()
        scale, _ = scale_from_range(low, high, fmt)
        assert scale.isfinite(), value
        assert scale > 0, value


@every_observer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_dtype_and_shape_counts_like_its_fp32_values(name, dtype):
    fmt = tensor_format("int8-tensor")
    x = heavy_tailed(2400).to(dtype)
    expected = observed(name, fmt, x.float()).range()
    assert observed(name, fmt, x.view(4, 20, 30).transpose(0, 2)).range() == expected
    assert expected[0].dtype == torch.float32


@every_observer
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_nan_and_infinity_are_refused_and_leave_no_trace(name, bad, word):
    fmt = tensor_format("int8-tensor")
    x = heavy_tailed(1000)
    observer = observed(name, fmt, x)
    before = observer.range()
    poisoned = x * 100
    poisoned[500] = bad
    with pytest.raises(NotFiniteError, match=f"calibration data gave {word}"):
        observer.update(poisoned)
    assert observer.count == 1000
    assert observer.range() == before


def test_the_quantizers_name_can_be_put_in_front():
    error = NotFiniteError("calibration data gave nan")
    assert str(NotFiniteError(f"quantizer 'mlp.up.input_quantizer': {error}")).startswith("quantizer 'mlp.up")


@every_observer
def test_without_data_there_is_no_range(name):
    observer = observed(name, tensor_format("int8-tensor"), torch.empty(0, 5))
    assert observer.count == 0
    with pytest.raises(UserError, match="no calibration data"):
        observer.range()


@pytest.mark.parametrize(
    ("spec", "fmt", "message"),
    [
        (ObserverSpec("mse"), NVFP4, "use absmax"),
        (ObserverSpec("entropy"), tensor_format("int8-token"), "use absmax"),
    ],
)
def test_observers_that_cannot_serve_are_refused(spec, fmt, message):
    with pytest.raises(UserError, match=message):
        make_observer(spec, fmt)


@every_observer
def test_data_that_require_a_gradient_are_only_read(name):
    x = heavy_tailed(1000).requires_grad_()
    before = x.detach().clone()
    low, _ = observed(name, tensor_format("int8-tensor"), x).range()
    assert not low.requires_grad
    assert torch.equal(x.detach(), before)


def test_the_range_of_probabilities_does_not_follow_the_data() -> None:
    observer = make_observer(ObserverSpec("unit"), tensor_format("e4m3-tensor"))
    observer.update(torch.tensor([0.1, 0.7]))
    low, high = observer.range()
    assert float(scale_from_range(low, high, tensor_format("e4m3-tensor"))[0]) == pytest.approx(1 / 448)
