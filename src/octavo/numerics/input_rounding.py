"""Inputs of layers as their quantizers will round them, known before any of them rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.scaling import outer_scale_from_range
from octavo.numerics.statistics import InputStatistics
from octavo.spec.plan import QuantizerSpec
from octavo.spec.tensor_format import PerTensor, TensorFormat


@dataclass(frozen=True, slots=True, eq=False)
class InputRounding:
    """What a quantizer will do: ``backends.simulate.round_inputs`` does it.

    Args:
        format: Of the input.
        scale: Of the outermost level; ``None`` where every call finds its own.
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
        return cls(spec.format, *outer_scale_from_range(known.low.amin(), known.high.amax(), spec.format))


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
