"""Inputs of layers as their quantizers will round them, known before any of them rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.loops import Loops
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.scaling import outer_scale_from_amax, scale_from_range
from octavo.numerics.statistics import InputStatistics
from octavo.spec.plan import QuantizerSpec
from octavo.spec.tensor_format import PerTensor, TensorFormat


@dataclass(frozen=True, slots=True, eq=False)
class InputRounding:
    """What a quantizer will do.

    Args:
        format: Of the input.
        scale: Of a static format: what its range gives, or of a nested one the scale of its scales; ``None`` where
            every call finds its own.
        zero_point: Beside it.
    """

    format: TensorFormat
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @classmethod
    def of(cls, spec: QuantizerSpec, known: InputStatistics) -> InputRounding | None:
        """By what is known of the input; ``None`` where its range cannot be told from that."""
        if spec.is_dynamic:
            return cls(spec.format)
        if spec.observer.name != "absmax" or known.low is None or known.high is None:
            return None
        low, high = known.low.amin(), known.high.amax()
        if spec.format.is_nested:
            return cls(spec.format, outer_scale_from_amax(torch.maximum(-low, high), spec.format))
        return cls(spec.format, *scale_from_range(low, high, spec.format))

    def __call__(self, rows: Tensor, loops: Loops | None = None) -> Tensor:
        """``(num_rows, in_features)`` rounded; ``loops`` as ``fake_quantize`` takes them."""
        if self.format.is_nested:
            return fake_quantize(rows, self.format, outer_scale=self.scale, loops=loops)
        return fake_quantize(rows, self.format, scale=self.scale, zero_point=self.zero_point, loops=loops)


def roundings_of(block: Block, layers: Iterable[str]) -> dict[str, InputRounding]:
    """Of those layers whose input will be rounded, in one way for all that read the same tensor.

    Scales that belong to a part of a tensor are told from rows where these are the tensor's own, not patches of it.
    """
    wanted, found = set(layers), dict[str, InputRounding]()
    placed = (group for group in block.placed_groups() if group.takes_scale and group.columns is None)
    own_rows = {name for group in placed for name in group.layers}
    for group in block.groups():
        specs = {block.input_spec(name) for name in group.layers}
        spec = specs.pop()
        if spec is None or specs or not wanted & set(group.layers):
            continue
        if not isinstance(spec.format.granularity, PerTensor) and not own_rows.issuperset(group.layers):
            continue
        rounding = InputRounding.of(spec, block.statistics(group.layers[0]))
        if rounding is not None:
            found |= dict.fromkeys(group.layers, rounding)
    return found
