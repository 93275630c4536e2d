"""What a factor for every input channel would do to a group of layers, judged from sums alone: no pass over data.

With ``W`` the weights, ``G`` the Gram matrix of the inputs over their number, and ``s`` the factors that divide the
input and multiply the weights' columns, the expected squared error of the outputs is ``tr(E G E^T)`` with
``E = Q(W s) / s - W``, plus what rounding the input costs: the noise of each channel times its column's energy.

Where scales are searched for afterwards, ``Q`` has to search, too: such a search looks after the channels that matter
by itself and leaves less for factors to gain. It moves every rounding error, so how the errors of two channels happen
to meet now says nothing; the diagonal of ``G`` is then the better judge, and needs no matrix product.

Legend: I input channels as the weights meet them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scale_search import search_scales
from octavo.numerics.weighting import Weighting
from octavo.spec.element import CodebookFormat, FloatFormat
from octavo.spec.tensor_format import PerGroup, TensorFormat

_MOST_ROWS = 128  # of a weight: enough to tell factors apart
_MOST_ROWS_SEARCHED = 384  # the same where there is no matrix product: luck of few rows looks like a better factor
_FEWEST_ROWS = 16
_MOST_ROWS_TOGETHER = 1024  # of all weights that one factor is for (experts)
_FLOAT_NOISE = 0.144  # mean squared error of rounding to a float, over its square, times 4^(mantissa bits + 1)


class Judge(Protocol):
    """Tells what factors cost."""

    def loss(self, scale_I: Tensor) -> float:
        """Expected squared error of outputs."""
        ...


@dataclass(frozen=True, slots=True)
class Reader:
    """One of the layers: some rows of its weight, and its format."""

    weight: Tensor
    format: TensorFormat

    @classmethod
    def of(cls, weight: Tensor, fmt: TensorFormat, *, num_readers: int = 1, is_searched: bool = False) -> Reader:
        """Evenly spaced rows where there are many; fewer where ``num_readers`` are judged together."""
        wanted = _MOST_ROWS_SEARCHED if is_searched else _MOST_ROWS
        most = max(_FEWEST_ROWS, min(wanted, _MOST_ROWS_TOGETHER // num_readers))
        return cls(weight.float()[:: -(-weight.shape[0] // most)], fmt)


@dataclass(frozen=True, slots=True)
class Rescaling:
    """Judges factors.

    Args:
        readers: The layers that read the tensor.
        gram: ``(I, I)`` mean of ``x^T x``, or ``(I,)`` its diagonal where that is all that is known.
        amax_x: ``(I,)`` largest absolute input.
        input_format: What the input is rounded to, ``None`` for nothing.
        is_searched: Weights get scales that ``numerics.scale_search`` finds by the diagonal, and no amax rule.
    """

    readers: Sequence[Reader]
    gram: Tensor
    amax_x: Tensor
    input_format: TensorFormat | None
    is_searched: bool = False

    def loss(self, scale_I: Tensor) -> float:
        """Expected squared error of the outputs that are looked at, summed over them."""
        noise_I = None if self.input_format is None else self._input_noise(scale_I, self.input_format)
        total = 0.0
        for reader in self.readers:
            scaled = reader.weight * scale_I
            error = self._rounded(scaled, reader.format, scale_I).div_(scale_I).sub_(reader.weight)
            through = error * self.gram if self.gram.ndim == 1 else error @ self.gram
            total += float(through.mul_(error).sum())
            if noise_I is not None:
                total += float((scaled.square() * noise_I).sum())
        return total

    def _rounded(self, scaled: Tensor, fmt: TensorFormat, scale_I: Tensor) -> Tensor:
        if not self.is_searched:
            return fake_quantize(scaled, fmt)
        weighting = Weighting(importance=self._squares / scale_I.square())
        scale, zero_point = search_scales(scaled, fmt, weighting, is_rough=True)
        return fake_quantize(scaled, fmt, scale=scale, zero_point=zero_point)

    @property
    def _squares(self) -> Tensor:
        return self.gram if self.gram.ndim == 1 else self.gram.diagonal()

    def _input_noise(self, scale_I: Tensor, fmt: TensorFormat) -> Tensor:
        """Variance of the rounding of every channel of ``x / scale``."""
        element = fmt.element
        if isinstance(element, FloatFormat):
            power = self._squares / scale_I.square()
            if isinstance(fmt.granularity, PerGroup) and power.numel() % fmt.granularity.size == 0:
                groups = power.view(-1, fmt.granularity.size)
                power = groups.mean(1, keepdim=True).expand_as(groups).flatten()
            return power * (_FLOAT_NOISE * 4.0 ** -(element.mantissa_bits + 1))
        assert not isinstance(element, CodebookFormat), "activations have no codebooks"
        amax = self.amax_x / scale_I
        if isinstance(fmt.granularity, PerGroup) and amax.numel() % fmt.granularity.size == 0:
            groups = amax.view(-1, fmt.granularity.size)
            top = groups.amax(1, keepdim=True).expand_as(groups).flatten()
        else:
            top = amax.amax().expand_as(amax)
        return (top / element.max).square() / 12


@dataclass(frozen=True, slots=True)
class Mixture:
    """Judges factors of a tensor whose readers get different rows of it.

    Args:
        parts: Share of the rows, and what judges those.
    """

    parts: Sequence[tuple[float, Judge]]

    def loss(self, scale_I: Tensor) -> float:
        """See ``Judge.loss``."""
        return sum(share * judge.loss(scale_I) for share, judge in self.parts)


def power_scale(up: Tensor, down: Tensor | None, alpha: float) -> Tensor:
    """``up^alpha / down^(1 - alpha)``, or ``up^alpha`` alone, with a geometric mean of 1.

    SmoothQuant (arXiv:2211.10438), equation 4, with the largest inputs and weights; AWQ (arXiv:2306.00978), equation 5,
    with the size of the inputs alone. Dividing ``x`` by it and multiplying the columns of ``w`` by it leaves
    ``x @ w.T`` unchanged; the mean of 1 lets both keep their order of magnitude.

    Args:
        up: ``(I,)`` size of the inputs.
        down: ``(I,)`` size of the weights' columns.
        alpha: 0 keeps the inputs as they are; 1 moves all of their range.

    Returns:
        ``(I,)`` between 1e-4 and 1e4; 1 for a channel that was never active or never used.
    """
    live = up > 0 if down is None else (up > 0) & (down > 0)
    logs = alpha * up.double().clamp(min=1e-30).log()
    if down is not None:
        logs = logs - (1 - alpha) * down.double().clamp(min=1e-30).log()
    logs = torch.where(live, logs, 0.0)
    mean = logs.sum() / live.sum().clamp(min=1)
    return torch.where(live, (logs - mean).exp().clamp(1e-4, 1e4), 1.0).float()
