"""Learned rounding: all weights of a block move by signed gradients until the block's outputs fit.

Cheng et al., SignRound/AutoRound (arXiv:2309.05516), section 3: every weight may move to the far end of its cell before
it is rounded, steps have a size that falls linearly, and gradients pass through the rounding as if it were not there.
It starts from what GPTQ found, with scales that are searched beforehand. What is kept is the best epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.codec import round_to
from octavo.numerics.error_feedback import Feedback, round_with_feedback
from octavo.numerics.layer_scales import searched, why_not_searched
from octavo.numerics.qtensor import QTensor
from octavo.numerics.statistics import Need, kept_rows
from octavo.numerics.weight_grid import WeightGrid
from octavo.spec.element import ElementFormat
from octavo.spec.steps import LearnedRounding

_NEAREST_EDGE = 0.45  # of a step: how near to the edge of its cell a weight may start


class LearnedRoundingAlgorithm:
    """See the module."""

    needs = frozenset({Need.GRAM, Need.OUTPUTS, Need.QUANTIZED, Need.GRADIENTS})
    preserves_function = False

    def __init__(self, options: LearnedRounding) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Fix every weight of the block together."""
        left = {layer: reason for layer in layers if (reason := why_not_searched(block, layer, "gram"))}
        movable = {layer: self._movable(block, layer) for layer in layers if layer not in left}
        if movable:
            with torch.enable_grad():
                self._learn(block, movable)
            for layer, weight in movable.items():
                block.fix_weight(layer, weight.codes())
        return left

    def _movable(self, block: Block, layer: str) -> _Movable:
        weight, gram = block.read_weight(layer).float(), block.statistics(layer).expected_gram
        scale, zero_point = searched(block, layer, "gram")
        fmt = block.weight_spec(layer).format
        start = round_with_feedback(weight, gram, fmt, scale=scale, zero_point=zero_point, options=Feedback(sweeps=2))
        assert start.scale is not None
        return _Movable.of(weight, WeightGrid.of(tuple(weight.shape), fmt, start.scale, start.zero_point), start)

    def _learn(self, block: Block, movable: Mapping[str, _Movable]) -> None:
        steps, done, least = self.options.steps, 0, float("inf")
        while done < steps:
            total = 0.0
            positions = {layer: weight.position.detach().clone() for layer, weight in movable.items()}
            for inputs, targets in zip(block.inputs(), block.targets(), strict=False):
                found = block.run(inputs, {layer: weight.rounded() for layer, weight in movable.items()})
                loss = _loss(found, targets, block.tokens(inputs))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
                for weight in movable.values():
                    weight.step(self.options.rate * max(0.0, 1 - done / steps))
                done += 1
            if total == 0.0:  # no batches, or nothing to gain
                return
            # an epoch's loss is summed while weights move: it stands for where the epoch began
            if total < least:
                least = total
                for layer, weight in movable.items():
                    weight.best = positions[layer]


def _loss(found: Sequence[Tensor], wanted: Sequence[Tensor], tokens: Tensor | None) -> Tensor:
    """Mean squared error of every output, summed; what a block makes of padding does not count."""
    parts = [_text(a, tokens).float() - _text(b, tokens).float() for a, b in zip(found, wanted, strict=True)]
    return torch.stack([part.square().mean() for part in parts if part.numel()]).sum()


def _text(output: Tensor, tokens: Tensor | None) -> Tensor:
    kept = kept_rows(tokens, output.shape, output.shape[:2].numel())
    return output if kept is None else output.flatten(0, 1)[kept.to(output.device)]


@dataclass(slots=True)
class _Movable:
    """A weight's position in steps of its grid, ``(in_features, out_features)``."""

    grid: WeightGrid
    position: Tensor
    low: Tensor
    high: Tensor
    best: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: WeightGrid, start: QTensor) -> _Movable:
        """Starts in the cells of ``start``, on the side where the weight is."""
        scale = grid.scale_IO.masked_fill(grid.scale_IO == 0, 1.0)
        code = start.dequantize().T / scale
        reach = _NEAREST_EDGE * _gap(code, grid.fmt.element)
        offset = (weight.T / scale - code).clamp(-reach, reach)
        position = (code + offset).contiguous().requires_grad_()
        width = 2 * reach
        return cls(grid, position, position.detach() - width, position.detach() + width, position.detach().clone())

    def rounded(self) -> Tensor:
        """``(out_features, in_features)``; gradients reach the position as if nothing were rounded."""
        straight = self.position + (self._on_grid(self.position.detach()) - self.position.detach())
        return (straight * self.grid.scale_IO).T

    def step(self, rate: float) -> None:
        """Downhill by ``rate`` of a step."""
        assert self.position.grad is not None
        with torch.no_grad():
            self.position.sub_(rate * self.position.grad.sign())
            self.position.copy_(torch.minimum(torch.maximum(self.position, self.low), self.high))
        self.position.grad = None

    def codes(self) -> QTensor:
        """The best position's codes."""
        return self.grid.codes(self._on_grid(self.best) * self.grid.scale_IO)

    def _on_grid(self, position: Tensor) -> Tensor:
        if self.grid.points_IO is None:
            return round_to(position, self.grid.fmt.element)
        return round_to(position.round() + self.grid.points_IO, self.grid.fmt.element) - self.grid.points_IO


def _gap(code: Tensor, element: ElementFormat) -> Tensor:
    """Distance of grid points around ``code``, in its own unit."""
    values = torch.tensor(element.values, dtype=torch.float32, device=code.device)
    at = torch.bucketize(code.contiguous(), values).clamp(1, len(values) - 1)
    return values[at] - values[at - 1]
