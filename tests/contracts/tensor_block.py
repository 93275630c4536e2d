"""A block made of plain tensors: three layers in a row, the middle two reading one tensor. ``Block`` in full.

``first -> relu -> (left, right) -> left * sigmoid(right) -> last``: a factor between ``first`` and ``left``/``right``
can be folded, one before ``last`` can be folded into ``left``, and one before ``first`` stays.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.numerics.block import Fold, InputGroup
from octavo.numerics.hadamard import rotate
from octavo.numerics.input_rounding import roundings_of
from octavo.numerics.qtensor import QTensor, fake_quantize
from octavo.numerics.statistics import Gatherer, InputStatistics, Need
from octavo.spec.facts import Slot
from octavo.spec.plan import ObserverSpec, QuantizerSpec
from octavo.spec.rule import slot_rule
from octavo.spec.tensor_format import TensorFormat

WIDTH, HIDDEN = 64, 96


def weights(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (HIDDEN, WIDTH), "left": (HIDDEN, HIDDEN), "right": (HIDDEN, HIDDEN), "last": (WIDTH, HIDDEN)}
    return {name: (torch.randn(s, generator=generator) * s[1] ** -0.5).to(dtype) for name, s in shapes.items()}


class Ear(Protocol):
    def update(self, rows: Tensor, full: Tensor | None = None) -> None: ...


class Heard:
    """Keeps what a layer reads."""

    rows: Tensor

    def update(self, rows: Tensor, full: Tensor | None = None) -> None:
        self.rows = rows


class TensorBlock:
    name = "block"

    def __init__(
        self, batches: Sequence[Tensor], fmt: TensorFormat, *, input_format: TensorFormat | None, dtype=torch.float32
    ) -> None:
        self.weights = weights(dtype)
        self.batches = list(batches)
        self.bias = {"last": torch.zeros(WIDTH)}
        self.fmt, self.input_format = fmt, input_format
        self.fixed: dict[str, QTensor] = {}
        self.unrounded: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.turns: dict[str, int] = {}
        self.branches: dict[str, tuple[Tensor, Tensor]] = {}
        self.gathered: dict[str, InputStatistics] = {}
        self.kept: list[Sequence[Tensor]] = []
        self.needs: frozenset[Need] = frozenset()
        self.masks: dict[int, Tensor] = {}
        self.rounds_inputs = False

    # What algorithms see

    def layers(self) -> Sequence[str]:
        return list(self.weights)

    def takes_low_rank(self, layer: str) -> bool:
        return layer not in self.branches

    def read_weight(self, layer: str) -> Tensor:
        return self.weights[layer]

    def write_weight(self, layer: str, value: Tensor) -> None:
        assert layer not in self.fixed
        self.weights[layer] = value.to(self.weights[layer].dtype)

    def read_bias(self, layer: str) -> Tensor | None:
        return self.bias.get(layer)

    def write_bias(self, layer: str, value: Tensor) -> None:
        self.bias[layer] = value

    def takes_bias(self, layer: str) -> bool:
        return layer not in self.bias

    def add_bias(self, layer: str, value: Tensor) -> None:
        assert layer not in self.bias
        self.bias[layer] = value

    def rounding_error(self, layer: str) -> Tensor:
        if layer in self.fixed:
            return self.weights[layer].float() - self.unrounded[layer].float()
        return fake_quantize(self.weights[layer], self.fmt).float() - self.weights[layer].float()

    def weight_spec(self, layer: str) -> QuantizerSpec:
        return QuantizerSpec(self.fmt, False, ObserverSpec())

    def input_spec(self, layer: str) -> QuantizerSpec | None:
        if self.input_format is None:
            return None
        rule = slot_rule(Slot.INPUT, self.input_format)
        return QuantizerSpec(rule.format, rule.is_dynamic, rule.observer or ObserverSpec())

    def is_turned(self, layer: str) -> bool:
        return False

    def groups(self) -> Sequence[InputGroup]:
        return [
            InputGroup(("first",), WIDTH),
            InputGroup(("left", "right"), HIDDEN, Fold("first", torch.arange(HIDDEN))),
            InputGroup(("last",), HIDDEN, Fold("left", torch.arange(HIDDEN))),
        ]

    def scale_groups(self) -> Sequence[InputGroup]:
        return self.groups()

    def placed_groups(self) -> Sequence[InputGroup]:
        return self.groups()

    def statistics(self, layer: str) -> InputStatistics:
        return self.gathered[layer]

    def fix_weight(self, layer: str, value: QTensor) -> None:
        assert layer not in self.fixed
        self.unrounded[layer] = self.weights[layer]
        self.fixed[layer] = value
        self.weights[layer] = value.dequantize(self.weights[layer].dtype)

    def mean_input(self, layer: str) -> Tensor | None:
        known = self.gathered[layer]
        return known.mean if known.total is not None and known.count else None

    def fixed_outer(self, layer: str) -> Tensor | None:
        scale = self.fixed[layer].scale if layer in self.fixed else None
        return (
            scale.scale
            if isinstance(scale, QTensor) and isinstance(scale.scale, Tensor) and not scale.scale.ndim
            else None
        )

    def set_pre_scale(self, group: InputGroup, scale: Tensor) -> None:
        assert not self.fixed.keys() & set(group.layers)
        assert bool((scale.isfinite() & (scale > 0)).all())
        if group.fold is None:
            layer = group.layers[0]
            self.scales[layer] = self.scales.get(layer, torch.ones_like(scale)) * scale
        else:
            producer = group.fold.producer
            self.weights[producer] = (self.weights[producer].float() / scale.unsqueeze(1)).to(self._dtype)
        for layer in group.layers:
            self.weights[layer] = (self.weights[layer].float() * scale).to(self._dtype)
            self.gathered[layer] = self.gathered[layer].divided_by(scale)

    def set_input_rotation(self, group: InputGroup, block_size: int) -> None:
        for layer in group.layers:
            self.turns[layer] = block_size
            self.weights[layer] = rotate(self.weights[layer], block_size)
            self.gathered[layer] = self.gathered[layer].turned(lambda x: rotate(x, block_size))

    def set_low_rank(self, layer: str, a: Tensor, b: Tensor) -> None:
        assert layer not in self.branches
        self.branches[layer] = (a, b)

    def inputs(self) -> Iterable[Any]:
        return range(len(self.batches))

    def tokens(self, inputs: Any) -> Tensor | None:
        return self.masks.get(inputs)

    def targets(self) -> Iterable[Sequence[Tensor]]:
        return list(self.kept)

    def run(self, inputs: Any, weights: Mapping[str, Tensor] | None = None) -> Sequence[Tensor]:
        return (self._forward(self.batches[inputs], weights or {}, {}),)

    # What walks do

    def gather(self, needs: frozenset[Need]) -> None:
        self.needs = needs
        ears = {name: Gatherer(needs) for name in self.weights}
        for batch in self.batches:
            output = self._forward(batch, {}, ears)
            self.kept += [(output.detach(),)] if Need.OUTPUTS in needs else []
        self.gathered = {name: ear.statistics() for name, ear in ears.items()}

    def gather_again(self, layers: Sequence[str], *, rounded: bool = False) -> None:
        roundings = roundings_of(self, layers) if rounded else {}
        needs = self.needs & {Need.GRAM, Need.CROSS}
        again = {name: Gatherer(needs) for name in layers}
        for batch in self.batches:
            full, live = ({name: Heard() for name in layers} for _ in range(2))
            self._forward(batch, self.unrounded if Need.UNROUNDED in self.needs else {}, full)
            self._forward(batch, {}, live)
            for name, gatherer in again.items():
                rows, by = live[name].rows, roundings.get(name)
                rounds = {} if by is None else {"outer_scale": by.scale, "zero_point": by.zero_point}
                gatherer.update(
                    rows, full[name].rows, rounded=None if by is None else fake_quantize(rows, by.format, **rounds)
                )
        self.gathered |= {name: gatherer.statistics() for name, gatherer in again.items()}

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    def _forward(self, x: Tensor, given: Mapping[str, Tensor], ears: Mapping[str, Ear]) -> Tensor:
        hidden = self._layer("first", x, given, ears).relu()
        gated = self._layer("left", hidden, given, ears) * self._layer("right", hidden, given, ears).sigmoid()
        return self._layer("last", gated, given, ears)

    def _layer(self, name: str, x: Tensor, given: Mapping[str, Tensor], ears: Mapping[str, Ear]) -> Tensor:
        x = x / self.scales[name] if name in self.scales else x
        x = rotate(x, self.turns[name]) if name in self.turns else x
        if name in ears:
            rows = x.flatten(0, -2)
            ears[name].update(rows, rows)
        if self.rounds_inputs:
            assert self.input_format is not None
            x = fake_quantize(x, self.input_format)
        output = x @ given.get(name, self.weights[name]).float().T
        if name in self.branches:
            a, b = self.branches[name]
            output = output + x @ a.float().T @ b.float().T
        return output + self.bias[name] if name in self.bias else output

    def error(self, reference: TensorBlock) -> float:
        """Squared error of the outputs over the squares of the reference's."""
        pairs = [(self.run(i)[0], reference.run(i)[0]) for i in self.inputs()]
        wanted = sum(float(b.double().square().sum()) for _, b in pairs)
        return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) / max(wanted, 1e-200)

    def copy(self) -> TensorBlock:
        return copy.deepcopy(self)
