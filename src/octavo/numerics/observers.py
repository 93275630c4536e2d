"""Static ranges from data: pure accumulators that a calibration run feeds.

Every observer takes tensors as they come, keeps a state that depends on the values seen and not on their order
(so that ``merge`` of two equals one that saw everything), and names a range at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol, Self

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.codec import round_owned
from octavo.numerics.histogram import NUM_BINS, Histogram, NotFiniteError, finite_extremes
from octavo.numerics.scaling import scale_from_range
from octavo.spec.plan import ObserverSpec
from octavo.spec.tensor_format import PerTensor, TensorFormat

__all__ = [
    "AbsMaxObserver",
    "EntropyObserver",
    "MseObserver",
    "NotFiniteError",
    "Observer",
    "PercentileObserver",
    "make_observer",
]

_NUM_CANDIDATES = 200  # ranges that the searches try
_NUM_PER_SIDE = 24  # ends tried on either side of an asymmetric range
_AT_ONCE = 32  # candidates simulated at a time


class Observer(Protocol):
    """Finds a static range."""

    @property
    def count(self) -> int:
        """How many values were seen."""
        ...

    def update(self, x: Tensor) -> None:
        """Take in every value of ``x``, of any shape and float dtype; nothing when it is empty.

        Raises:
            NotFiniteError: ``x`` contains NaN or inf; nothing of it was taken in.
        """
        ...

    def merge(self, other: Self) -> None:
        """Take in what ``other``, of the same kind, has seen."""
        ...

    def range(self) -> tuple[Tensor, Tensor]:
        """``(low, high)``, fp32 scalars on the CPU, for ``scaling.scale_from_range``.

        Raises:
            UserError: nothing was seen.
        """
        ...


def make_observer(spec: ObserverSpec, fmt: TensorFormat) -> Observer:
    """The observer that ``spec`` names, for a quantizer of ``fmt``.

    Raises:
        UserError: there is no such observer, its percentile is not in (0, 100], or it cannot serve the format.

    >>> from octavo.spec.formats import tensor_format
    >>> observer = make_observer(ObserverSpec("absmax"), tensor_format("int8-tensor"))
    >>> observer.update(torch.tensor([3.0, -1.0]))
    >>> observer.range()
    (tensor(-1.), tensor(3.))
    """
    match spec.name:
        case "absmax":
            return AbsMaxObserver()
        case "percentile":
            return PercentileObserver(spec.percentile, fmt)
        case "mse":
            return MseObserver(fmt)
        case "entropy":
            return EntropyObserver(fmt)
        case "unit":
            return UnitObserver()
        case _:
            raise UserError(f"unknown observer {spec.name!r}: choose absmax, percentile, mse, entropy or unit")


class AbsMaxObserver:
    """The smallest and the largest value: nothing saturates on the calibration data."""

    def __init__(self) -> None:
        self.count = 0
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        """See ``Observer``. One pass over ``x``."""
        if x.numel():
            low, high = finite_extremes(x)
            self.low, self.high = min(self.low, low), max(self.high, high)
            self.count += x.numel()

    def merge(self, other: Self) -> None:
        """See ``Observer``."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count

    def range(self) -> tuple[Tensor, Tensor]:
        """See ``Observer``."""
        _check_seen(self.count)
        return torch.tensor(self.low), torch.tensor(self.high)


class UnitObserver(AbsMaxObserver):
    """The range of probabilities, 0 to 1, whatever is seen: engines fix the scale of a softmax so."""

    def range(self) -> tuple[Tensor, Tensor]:
        """See ``Observer``."""
        _check_seen(self.count)
        return torch.tensor(0.0), torch.tensor(1.0)


class _HistogramObserver(ABC):
    """What the three observers on a histogram share."""

    def __init__(self, fmt: TensorFormat) -> None:
        self.fmt = fmt
        self.histogram = Histogram()

    @property
    def count(self) -> int:
        """See ``Observer``."""
        return self.histogram.count

    def update(self, x: Tensor) -> None:
        """See ``Observer``."""
        self.histogram.update(x)

    def merge(self, other: Self) -> None:
        """See ``Observer``."""
        self.histogram.merge(other.histogram)

    def range(self) -> tuple[Tensor, Tensor]:
        """See ``Observer``. Never wider than what was seen."""
        _check_seen(self.count)
        low, high = self._limits()
        return torch.tensor(max(low, self.histogram.low)), torch.tensor(min(high, self.histogram.high))

    @abstractmethod
    def _limits(self) -> tuple[float, float]:
        """The range that was found, perhaps wider than what was seen."""


class PercentileObserver(_HistogramObserver):
    """The range that keeps a share of the values, to the width of a bin.

    Symmetric formats keep ``percentile`` per cent of the absolute values; asymmetric ones leave half of the rest
    out at either end.
    """

    def __init__(self, percentile: float, fmt: TensorFormat) -> None:
        if not 0 < percentile <= 100:
            raise UserError(f"an observer cannot keep {percentile} per cent: choose a percentile such as 99.99")
        super().__init__(fmt)
        self.percentile = percentile

    def _limits(self) -> tuple[float, float]:
        width, counts = self.histogram.width, self.histogram.counts
        if self.fmt.is_symmetric:
            top = _bins_holding(self.histogram.magnitudes, self.percentile / 100) * width
            return -top, top
        share = 0.5 + self.percentile / 200
        low = NUM_BINS - _bins_holding(counts.flip(0), share)
        return low * width, (_bins_holding(counts, share) - NUM_BINS) * width


class MseObserver(_HistogramObserver):
    """The range with the smallest expected squared error of the format, every value taken as the middle of its bin.

    Symmetric formats try even fractions of the largest magnitude, asymmetric ones even fractions of either end.
    """

    def __init__(self, fmt: TensorFormat) -> None:
        _check_per_tensor("mse", fmt)
        super().__init__(fmt)

    def _limits(self) -> tuple[float, float]:
        used = self.histogram.counts.nonzero().squeeze(1)
        values, weights = self.histogram.centres[used], self.histogram.counts[used].double()
        lows, highs = self._candidates()
        errors = [
            (_simulated(values, low, high, self.fmt) - values).double().square() @ weights
            for low, high in zip(torch.split(lows, _AT_ONCE), torch.split(highs, _AT_ONCE), strict=True)
        ]
        best = int(torch.cat(errors).argmin())
        return lows[best].item(), highs[best].item()

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """``(candidates, 1)`` low and high ends, the widest first."""
        if self.fmt.is_symmetric:
            tops = self.histogram.amax * torch.linspace(1, 1 / _NUM_CANDIDATES, _NUM_CANDIDATES).unsqueeze(1)
            return -tops, tops
        shares = torch.linspace(1, 1 / _NUM_PER_SIDE, _NUM_PER_SIDE)
        ends = torch.cartesian_prod(min(self.histogram.low, 0.0) * shares, max(self.histogram.high, 0.0) * shares)
        return ends[:, :1], ends[:, 1:]


class EntropyObserver(_HistogramObserver):
    """The range whose quantized histogram diverges least (Kullback-Leibler) from the clipped one.

    Migacz, 8-bit inference with TensorRT (GTC 2017), with the format's own levels in the place of 128 equal ones.
    The reference is the histogram with all that lies outside counted in the outermost bins that are not empty; its
    quantized twin leaves that out and spreads each level's count evenly over the level's non-empty bins. The bin
    of zero counts like its neighbour, because exact zeros cost nothing.
    """

    def __init__(self, fmt: TensorFormat) -> None:
        _check_per_tensor("entropy", fmt)
        super().__init__(fmt)

    def _limits(self) -> tuple[float, float]:
        counts = self.histogram.counts.double()
        counts[NUM_BINS] = counts[NUM_BINS + 1]
        used = counts.nonzero().squeeze(1)
        last = int(self.histogram.magnitudes.nonzero().max()) + 1
        first = min(last, 1 << (self.fmt.element.bits - 1))  # TensorRT starts where every level has one bin
        thresholds = sorted({round(t) for t in torch.linspace(first, last, _NUM_CANDIDATES).tolist()})
        divergences = [self._divergence(threshold, used, counts[used]) for threshold in thresholds]
        top = thresholds[divergences.index(min(divergences))] * self.histogram.width
        return -top, top

    def _divergence(self, threshold: int, used: Tensor, counts: Tensor) -> float:
        """Of clipping ``threshold`` bins from zero; ``used`` are the bins that are not empty."""
        top = threshold * self.histogram.width
        low = torch.tensor(max(-top, self.histogram.low))
        high = torch.tensor(min(top, self.histogram.high))
        is_inside = (used >= NUM_BINS - threshold) & (used < NUM_BINS + threshold)
        if not is_inside.any():
            return math.inf
        levels = _simulated(self.histogram.centres[used[is_inside]], low, high, self.fmt)
        below, above = counts[used < NUM_BINS - threshold].sum(), counts[used >= NUM_BINS + threshold].sum()
        return _divergence_of_levels(counts[is_inside], levels, below, above)


def _divergence_of_levels(counts: Tensor, levels: Tensor, below: Tensor, above: Tensor) -> float:
    """Kullback-Leibler divergence of a clipped histogram from its quantized twin.

    Args:
        counts: ``(bins,)`` fp64 counts inside the range, of bins that are not empty.
        levels: ``(bins,)`` ascending; the value that each bin is rounded to.
        below: Count of what is clipped at the low end.
        above: Count of what is clipped at the high end.
    """
    level = torch.unique_consecutive(levels, return_inverse=True)[1]
    twin = (torch.bincount(level, counts) / torch.bincount(level))[level]
    reference = counts.clone()
    reference[0] += below
    reference[-1] += above
    reference, twin = reference / reference.sum(), twin / twin.sum()
    return float((reference * (reference / twin).log()).sum())


def _simulated(values: Tensor, low: Tensor, high: Tensor, fmt: TensorFormat) -> Tensor:
    """``values`` rounded as if the range were ``[low, high]``, which broadcast against them."""
    scale, zero_point = scale_from_range(low, high, fmt)
    if zero_point is None:
        return round_owned(values / scale, fmt.element).mul_(scale)
    return round_owned((values / scale).round_().add_(zero_point), fmt.element).sub_(zero_point).mul_(scale)


def _bins_holding(counts: Tensor, share: float) -> int:
    """How many bins from the start hold ``share`` of all counts."""
    cumulative = counts.cumsum(0).double()
    return int(torch.searchsorted(cumulative, share * cumulative[-1])) + 1


def _check_seen(count: int) -> None:
    if not count:
        raise UserError("no calibration data was seen: a static range needs some; run calibration, or make it dynamic")


def _check_per_tensor(name: str, fmt: TensorFormat) -> None:
    if not isinstance(fmt.granularity, PerTensor) or fmt.offset is not None:
        raise UserError(f"the {name} observer finds one range for a whole tensor, {fmt} has one per block: use absmax")
