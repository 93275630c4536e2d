"""A block of a model as algorithms see it: the protocol, and the groups of layers that agree on their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.numerics.block_state import BlockState
from octavo.numerics.qtensor import QTensor
from octavo.numerics.statistics import InputStatistics, Need
from octavo.spec.plan import QuantizerSpec


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Where a factor for every input channel can be moved to, so that nothing is left of it at run time.

    Multiplying the producer's channels and dividing the readers' weight columns, or the reverse, leaves the block's
    function as it is.

    Args:
        producer: Name of the norm or layer that makes the tensor.
        sources: ``(num_channels,)`` int64: which of the producer's channels feeds each channel that is read. Grouped
            queries read a channel of the values several times.
    """

    producer: str
    sources: Tensor

    def tie(self, scale: Tensor) -> Tensor:
        """``scale`` with the geometric mean over all channels that are fed by one; only such a scale can be folded."""
        size = int(self.sources.max()) + 1
        sums = scale.new_zeros(size).index_add_(0, self.sources, scale.log())
        counts = scale.new_zeros(size).index_add_(0, self.sources, torch.ones_like(scale))
        return (sums / counts.clamp(min=1)).exp()[self.sources]


@dataclass(frozen=True, slots=True, eq=False)
class InputGroup:
    """Layers that read the same tensor, or parts of one tensor, so that they must agree on what is done to it.

    Args:
        layers: Site names in the order of the forward pass; a layer that reads alone is a group of one.
        num_channels: Channels of the tensor: ``in_features`` of a linear layer.
        fold: Where a factor can be folded; ``None`` where it has to stay at the layers as ``pre_scale``.
        columns: ``(in_features,)`` int64, the channel that each column of the weights meets; ``None`` when column ``k``
            meets channel ``k``. A convolution has one column for every position of its kernel; in groups it depends on
            the row, too: ``(out_features, in_features)``.
        takes_scale: Whether ``set_pre_scale`` is possible.
    """

    layers: tuple[str, ...]
    num_channels: int
    fold: Fold | None = None
    columns: Tensor | None = None
    takes_scale: bool = True

    def tie(self, scale: Tensor) -> Tensor:
        """``scale`` as it can be used: one that is folded is the same wherever one producer channel is read."""
        return scale if self.fold is None else self.fold.tie(scale)

    def per_column(self, scale: Tensor) -> Tensor:
        """``(num_channels,)`` values as ``(in_features,)``."""
        return scale if self.columns is None else scale[self.columns]


def matrix_name(site: str, index: int) -> str:
    """What algorithms call one matrix of a stack of weights.

    >>> matrix_name("mlp.experts#linear0", 3), site_of("mlp.experts#linear0[3]"), site_of("mlp.up")
    ('mlp.experts#linear0[3]', 'mlp.experts#linear0', 'mlp.up')
    """
    return f"{site}[{index}]"


def site_of(layer: str) -> str:
    """The site that a layer, or the matrix of a stack, belongs to."""
    return layer.rpartition("[")[0] if layer.endswith("]") else layer


class Block(Protocol):
    """A part of a model, and the only thing an algorithm sees.

    Weights are ``(..., out_features, in_features)``; layers are named by their site. A stack of weights (experts) is as
    many layers, ``<site>[<number>]``, each with the rows that its expert is sent. Until the block is settled its
    forward is in full precision: quantizers pass values through, and what algorithms wrote is in effect.
    """

    name: str

    def layers(self) -> Sequence[str]:
        """Layers whose weight gets a quantizer, in the order of the forward pass."""
        ...

    def read_weight(self, layer: str) -> Tensor:
        """``(..., out_features, in_features)`` view of a layer's weight as it is now; not to be written to."""
        ...

    def write_weight(self, layer: str, value: Tensor) -> None:
        """Replace a layer's weight; shape and dtype stay."""
        ...

    def read_bias(self, layer: str) -> Tensor | None:
        """``(out_features,)``, or ``None`` for a layer without."""
        ...

    def write_bias(self, layer: str, value: Tensor) -> None:
        """Replace a bias that is there."""
        ...

    def takes_bias(self, layer: str) -> bool:
        """Whether ``add_bias`` is possible."""
        ...

    def add_bias(self, layer: str, value: Tensor) -> None:
        """Give a bias ``(out_features,)`` to a layer without."""
        ...

    def weight_spec(self, layer: str) -> QuantizerSpec:
        """What the plan gives the weight."""
        ...

    def input_spec(self, layer: str) -> QuantizerSpec | None:
        """What the plan gives the input, ``None`` for nothing."""
        ...

    def takes_low_rank(self, layer: str) -> bool:
        """Whether ``set_low_rank`` is possible: for linear layers that have no branch yet."""
        ...

    def is_turned(self, layer: str) -> bool:
        """Whether a rotation fused into weights turned what the layer reads."""
        ...

    def groups(self) -> Sequence[InputGroup]:
        """Every layer of ``layers()``, in exactly one group."""
        ...

    def scale_groups(self) -> Sequence[InputGroup]:
        """Every layer of ``layers()``, in exactly one group of layers whose inputs take a factor together.

        They are ``groups()``, but for what reads parts of one tensor: all experts, and what shares their input, are one
        group, whose layers have statistics of their own. Unquantized readers of it (a router) follow by themselves.
        """
        ...

    def placed_groups(self) -> Sequence[InputGroup]:
        """The same for what stays at the layers (rotations at run time): all matrices of a stack are one group."""
        ...

    def statistics(self, layer: str) -> InputStatistics:
        """Of what the weight meets now: what was gathered, with every scale and rotation set since taken into account.

        Layers of one of ``groups()`` share them.
        """
        ...

    def mean_input(self, layer: str) -> Tensor | None:
        """Mean of what each weight meets: ``(in_features,)``, or ``(out_features, in_features)`` in a convolution in
        groups; ``None`` where nothing was gathered. Needs ``MEAN``.
        """
        ...

    def fix_weight(self, layer: str, value: QTensor) -> None:
        """The layer's weight from now on: exactly these codes and scales, in simulation and in files."""
        ...

    def rounding_error(self, layer: str) -> Tensor:
        """``(..., out_features, in_features)`` fp32: a layer's weight as it is simulated minus as it was before. Needs
        ``UNROUNDED``.

        One that no step has fixed is rounded to nearest for it, as ``settle`` will.
        """
        ...

    def fixed_outer(self, layer: str) -> Tensor | None:
        """The scale of a fixed weight's scales, in a format with one per tensor; layers of a group agree on it."""
        ...

    def set_pre_scale(self, group: InputGroup, scale: Tensor) -> None:
        """Divide the tensor that a group reads by ``scale``, and multiply the columns of its weights by it.

        Folded into the producer where the group has one, else kept at the layers. Several calls multiply.

        Args:
            group: Of any of the three kinds.
            scale: ``(num_channels,)``, positive and finite.

        Raises:
            UserError: a weight is fixed already, or the scale is not positive and finite.
        """
        ...

    def set_input_rotation(self, group: InputGroup, block_size: int) -> None:
        """Rotate the tensor that a group reads, when it is computed with, and its weights' columns to match.

        The rotation is a Hadamard matrix, divided by the root of its size, on every ``block_size`` neighbours.

        Args:
            group: One of ``groups()`` or ``placed_groups()``.
            block_size: See above.

        Raises:
            UserError: the size does not divide the channels or has no Hadamard matrix, or a weight is fixed already.
        """
        ...

    def set_low_rank(self, layer: str, a: Tensor, b: Tensor) -> None:
        """Add ``x @ a.T @ b.T`` to a layer's output; ``x`` is its input after scale and rotation, before rounding.

        Args:
            a: ``(rank, in_features)``.
            b: ``(out_features, rank)``.
        """
        ...

    def inputs(self) -> Iterable[Any]:
        """What ``run`` takes, batch by batch; their content is the block's own business."""
        ...

    def tokens(self, inputs: Any) -> Tensor | None:
        """``(batch, length)``: which positions of one of ``inputs`` hold no padding; ``None``: all, or nobody knows."""
        ...

    def targets(self) -> Iterable[Sequence[Tensor]]:
        """The block's outputs in full precision for each of ``inputs``. Needs ``OUTPUTS``."""
        ...

    def run(self, inputs: Any, weights: Mapping[str, Tensor] | None = None) -> Sequence[Tensor]:
        """The block's forward on one batch: every floating tensor that it returns.

        Args:
            inputs: One of ``inputs()``.
            weights: Layer -> weight to compute with instead of its own; gradients reach them.
        """
        ...

    def probe(self, *, as_before: bool = False) -> Sequence[Tensor]:
        """What the block returns in full precision for a few samples; nothing without data.

        Args:
            as_before: Every token goes to the experts that it went to in the last probe that was not so: where two are
                as good as equal, rounding chooses.
        """
        ...

    def probe_rounded(self) -> Sequence[Tensor]:
        """``probe`` with every weight that is not fixed rounded to nearest; nothing where that cannot be tried."""
        ...

    def gather(self, needs: frozenset[Need]) -> None:
        """One pass in full precision over ``inputs``, which gathers all statistics and ranges."""
        ...

    def gather_again(self, layers: Sequence[str], *, rounded: bool = False) -> None:
        """One pass over ``inputs`` for the sums of ``layers`` alone, as the weights that are fixed by now make them.

        ``GRAM`` and ``CROSS`` where they were asked for; the latter with what the layers would read in the unquantized
        model, for which it needs ``UNROUNDED``.

        Args:
            layers: Whose sums are wanted.
            rounded: Inputs are taken as their quantizers will round them, where that can be told
                (``numerics.input_rounding``); ``CROSS`` is then there for these layers, and where it was not asked for
                it is with what they are before.
        """
        ...

    def settle(self) -> Mapping[str, str]:
        """Give every quantizer its range and start rounding; what was not fixed is rounded to nearest.

        Returns:
            Quantizer name -> why it stays off.
        """
        ...

    def state(self) -> BlockState:
        """What steps and ``settle`` have changed since the block was handed out, wherever it is."""
        ...

    def recall(self, state: BlockState) -> None:
        """In place of ``gather``, steps and ``settle``: the block as it was when ``state`` was taken.

        Data pass through it once, as through any other, for what later blocks learn from that.

        Args:
            state: Of this block, in a walk over the same model and data with the same plan and steps.
        """
        ...

    def advance(self) -> float | None:
        """Hand outputs on to what comes next, by one pass where none are known yet.

        Returns:
            Squared error of the simulated outputs on the first batch over the squares of the full-precision ones, both
            from the same inputs; ``None`` without data.
        """
        ...
