"""What algorithms may know of a layer's input: sums over every row that reached it, gathered in one pass.

A *row* is one vector that meets the weight: a token of a linear layer, an unfolded patch of a convolution. Sums leave
padding out where a batch says by ``attention_mask`` what padding is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from octavo.numerics.histogram import NotFiniteError
from octavo.numerics.shrinkage import shrunk


class Need(Enum):
    """What an algorithm asks to be gathered; each costs time, so only what some step asks for is."""

    RANGE = "range"  # smallest and largest value of every channel; always there
    MEAN = "mean"  # mean of every channel
    MEAN_SQUARE = "mean_square"  # mean of the squares of every channel
    GRAM = "gram"  # X^T X
    SAMPLED_GRAM = "sampled_gram"  # the same from some of the rows, where there are far more than channels: cheaper
    CROSS = "cross"  # X_full^T X, where X_full came by the unquantized path and X by the quantized one: of layers that
    # read the block's own input, and of any that are gathered again
    UNROUNDED = "unrounded"  # weights are kept as they were before they were rounded
    GRADIENTS = "gradients"  # of a block's outputs to weights that it is run with
    OUTPUTS = "outputs"  # the block's unquantized outputs are kept
    QUANTIZED = (
        "quantized"  # inputs come through the quantized blocks before, whose errors the algorithm can make up for
    )


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Sums over the rows ``x`` that a layer read. ``None`` for what nobody asked for.

    Args:
        count: Number of rows.
        low: ``(in_features,)`` smallest value of every channel.
        high: ``(in_features,)`` largest value.
        total: ``(in_features,)`` sum of every channel.
        squares: ``(in_features,)`` sum of the squares of every channel.
        gram: ``(in_features, in_features)`` sum of ``x^T x``, fp32; an estimate of it for ``SAMPLED_GRAM``.
        cross: ``(in_features, in_features)`` sum of ``x_full^T x``, fp32; row: channel on the unquantized path.
        drift: ``(in_features, in_features)`` sum of ``(x_full - x)^T (x_full - x)``, fp32, where there is ``cross``.
        num_gram_rows: Rows behind ``gram``: fewer than ``count`` for ``SAMPLED_GRAM``.
        is_assumed: No row was seen (by an expert that no token was sent to), and one of white noise stands for them:
            errors are then those of the weight alone.
    """

    count: int
    low: Tensor | None = None
    high: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None
    gram: Tensor | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None
    num_gram_rows: int = 0
    is_assumed: bool = False

    @classmethod
    def white(cls, num_channels: int, device: torch.device) -> InputStatistics:
        """One row in which every channel has mean 0 and mean square 1, and knows nothing of the others."""
        one = torch.ones(num_channels, device=device)
        return cls(1, -one, one, torch.zeros_like(one), one, torch.eye(num_channels, device=device), is_assumed=True)

    @property
    def amax(self) -> Tensor:
        """``(in_features,)`` largest absolute value of every channel."""
        assert self.low is not None, "not known after a rotation"
        assert self.high is not None
        return torch.maximum(-self.low, self.high).clamp(min=0)

    @property
    def expected_gram(self) -> Tensor:
        """What ``gram`` would be of other rows like these, as well as can be told: see ``numerics.shrinkage``."""
        assert self.gram is not None, "GRAM was not asked for"
        return shrunk(self.gram, self.num_gram_rows)

    @property
    def mean(self) -> Tensor:
        """``(in_features,)`` mean of every channel. Needs ``MEAN``."""
        assert self.total is not None, "MEAN was not asked for"
        return self.total / max(1, self.count)

    @property
    def mean_square(self) -> Tensor:
        """``(in_features,)`` mean square of every channel. Needs ``MEAN_SQUARE`` or ``GRAM``."""
        squares = self.gram.diagonal() if self.squares is None and self.gram is not None else self.squares
        assert squares is not None, "neither MEAN_SQUARE nor GRAM was asked for"
        return squares / max(1, self.count)

    def divided_by(self, scale: Tensor) -> InputStatistics:
        """The statistics of ``x / scale``; ``scale`` is ``(in_features,)`` and positive. Exact up to rounding."""
        inverse = 1.0 / scale.float()

        def row(part: Tensor | None, factor: Tensor) -> Tensor | None:
            return None if part is None else part * factor

        def both(part: Tensor | None) -> Tensor | None:
            return None if part is None else part * inverse.unsqueeze(1) * inverse

        return dataclasses.replace(
            self,
            low=row(self.low, inverse),
            high=row(self.high, inverse),
            total=row(self.total, inverse),
            squares=row(self.squares, inverse.square()),
            gram=both(self.gram),
            cross=both(self.cross),
            drift=both(self.drift),
        )

    def turned(self, turn: Callable[[Tensor], Tensor]) -> InputStatistics:
        """The statistics of ``turn(x)``, which multiplies the last axis by an orthogonal matrix.

        Ranges are not known after a rotation; sums of squares are where there is a Gram matrix.
        """

        def both(part: Tensor | None) -> Tensor | None:
            return None if part is None else turn(turn(part).T.contiguous()).T

        total = None if self.total is None else turn(self.total)
        return InputStatistics(
            self.count,
            total=total,
            gram=both(self.gram),
            cross=both(self.cross),
            drift=both(self.drift),
            num_gram_rows=self.num_gram_rows,
            is_assumed=self.is_assumed,
        )


_ROWS_PER_CHANNEL = 4  # that a sampled Gram matrix keeps at least
_LARGEST_STRIDE = 4


def tokens_of(batch: Any) -> Tensor | None:
    """``(batch, length)``: which positions hold text and no padding; ``None`` where a batch does not say, or all do."""
    match batch:
        case Mapping():
            mask = None if "decoder_input_ids" in batch else batch.get("attention_mask")
            is_known = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
            return mask.bool() if isinstance(mask, Tensor) and is_known else None
        case tuple() | list():
            return next((mask for part in batch if (mask := tokens_of(part)) is not None), None)
        case _:
            return None


def kept_rows(tokens: Tensor | None, shape: Sequence[int], num_rows: int) -> Tensor | None:
    """``(num_rows,)``: which rows of a tensor of ``shape`` hold text; ``None``: all, or they are no positions."""
    is_text = tokens is not None and tuple(shape[:2]) == tuple(tokens.shape) and num_rows == tokens.numel()
    return tokens.flatten() if tokens is not None and is_text else None


class Gatherer:
    """Takes in rows, a few at a time, and sums what was asked for. Sums are fp32.

    Args:
        needs: What to gather.
        num_updates: How often rows will come; tells how many a sampled Gram matrix can do without.
    """

    def __init__(self, needs: Iterable[Need], num_updates: int = 1) -> None:
        self.needs = frozenset(needs)
        self.num_updates = num_updates
        self._stride = 0
        self._num_gram_rows = 0
        self._parts: dict[str, Tensor] = {}
        self.count = 0

    def update(
        self,
        rows: Tensor,
        full: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        rounded: Tensor | None = None,
    ) -> None:
        """Take in some rows.

        Args:
            rows: ``(num_rows, in_features)`` of any float dtype.
            full: The same rows from the unquantized path.
            kept: ``(num_rows,)``, bool: leaves rows of padding out of all sums. Ranges are of every row: the model
                will read such rows, too.
            rounded: ``rows`` as the input's quantizer makes them: products are of these, and ``CROSS`` is there whether
                it was asked for or not, with ``full``, or with ``rows`` where there is none.

        Raises:
            NotFiniteError: NaN or inf among them; nothing of them was taken in.
        """
        if not rows.numel():
            return
        rows = rows.detach().float()
        low, high = rows.amin(dim=0), rows.amax(dim=0)  # aminmax takes 10 to 30 times as long along the first axis
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise NotFiniteError("the input holds NaN or inf")
        self._extreme("low", low, torch.minimum)
        self._extreme("high", high, torch.maximum)
        if kept is not None:
            rows, full = rows[kept], None if full is None else full[kept]
            rounded = None if rounded is None else rounded[kept]
        self.count += rows.shape[0]
        if not rows.shape[0]:
            return
        if Need.MEAN in self.needs:
            self._add("total", rows.sum(0))
        met = rows if rounded is None else rounded
        if self.needs & {Need.GRAM, Need.SAMPLED_GRAM}:
            chosen = met[:: self._chosen_stride(met)]
            self._num_gram_rows += len(chosen)
            add_gram(self._zeros("gram", rows), chosen)
        elif Need.MEAN_SQUARE in self.needs:
            self._add("squares", torch.einsum("ri,ri->i", met, met))
        if Need.CROSS in self.needs or rounded is not None:
            assert full is not None or rounded is not None, "CROSS needs the rows of the unquantized path"
            full = rows if full is None else full.detach().float()
            self._zeros("cross", met).addmm_(full.T, met)
            add_gram(self._zeros("drift", met), full - met)

    def statistics(self) -> InputStatistics:
        """Everything so far."""
        parts: dict[str, Any] = dict(self._parts)
        gram = parts.get("gram")
        if gram is not None:
            parts["gram"] = (gram.triu() + gram.triu(1).T) * self._stride
        drift = parts.get("drift")
        if drift is not None:
            parts["drift"] = drift.triu() + drift.triu(1).T
        return InputStatistics(self.count, num_gram_rows=self._num_gram_rows, **parts)

    def _chosen_stride(self, rows: Tensor) -> int:
        """Every how many rows one is taken; chosen when the first come, so that it is the same in every run."""
        if not self._stride:
            spare = rows.shape[0] * self.num_updates // (_ROWS_PER_CHANNEL * rows.shape[1])
            self._stride = 1 if Need.GRAM in self.needs else max(1, min(spare, _LARGEST_STRIDE))
        return self._stride

    def _extreme(self, name: str, value: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        known = self._parts.get(name)
        self._parts[name] = value if known is None else choose(known, value)

    def _add(self, name: str, value: Tensor) -> None:
        known = self._parts.get(name)
        self._parts[name] = value if known is None else known.add_(value)

    def _zeros(self, name: str, rows: Tensor) -> Tensor:
        if name not in self._parts:
            self._parts[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        return self._parts[name]


def add_gram(gram: Tensor, rows: Tensor, *, strip: int = 256) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram``, in place; below it are partial sums of no meaning.

    Symmetry saves up to half of the multiply-adds: each strip of columns meets only itself and those after it.

    Args:
        gram: ``(in_features, in_features)``.
        rows: ``(num_rows, in_features)``, of the same dtype.
        strip: Columns at a time.
    """
    for first in range(0, rows.shape[1], strip):
        last = min(first + strip, rows.shape[1])
        gram[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])
