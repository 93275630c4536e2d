"""The range of a weight, by the plan's observer: one rule for every door."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.backends.codes import quantize
from octavo.backends.simulate import loops_for, range_of
from octavo.numerics.qtensor import QTensor
from octavo.numerics.scale_search import outer_scale, search_scales
from octavo.numerics.scaling import outer_scale_from_amax, search_scale
from octavo.spec.plan import QuantizerSpec
from octavo.spec.tensor_format import ScaleRule

WeightRange = tuple[Tensor | QTensor, Tensor | None]


@torch.no_grad()
def weight_range(
    matrix: Tensor, spec: QuantizerSpec, *, shared_amax: Tensor | None = None, outer: Tensor | None = None
) -> WeightRange:
    """Scale and zero point as ``quantize`` takes them.

    Args:
        matrix: ``(..., out_features, in_features)``, finite.
        spec: A scaled format, and how its range is found.
        shared_amax: Largest magnitude of all weights that share the scale of their scales with this one.
        outer: That scale, where one of them is fixed already.
    """
    fmt = spec.format
    if spec.observer.name == "mse":
        return _searched(matrix, spec, shared_amax, outer)
    if not fmt.is_nested:
        return range_of(matrix, fmt)
    if outer is None and shared_amax is not None:
        outer = outer_scale_from_amax(shared_amax, fmt)
    found = quantize(matrix, fmt, outer_scale=outer)
    assert found.scale is not None
    return found.scale, found.zero_point


def _searched(matrix: Tensor, spec: QuantizerSpec, shared_amax: Tensor | None, outer: Tensor | None) -> WeightRange:
    fmt = spec.format
    # full-range wants larger scales than its rule's, too: the other end saturates
    if fmt.is_symmetric and not fmt.is_nested and fmt.scale_rule is not ScaleRule.FULL_RANGE:
        return search_scale(matrix, fmt, loops=loops_for(matrix, fmt)), None
    if outer is None and shared_amax is not None and fmt.is_nested:
        outer = outer_scale(shared_amax, fmt)
    return search_scales(matrix, fmt, outer=outer)
