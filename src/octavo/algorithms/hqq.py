"""Half-quadratic quantization (Badri, Shaji, HQQ, 2023, https://mobiusml.github.io/hqq_blog): scales without any data.

Weights have heavy tails, so the error is measured by ``|e|^p`` with ``p < 1``: a few large errors are let be.
Alternates between the part of the error that is to be left as an outlier (generalized soft-thresholding) and the zero
point that is best for the rest, or the scale where a format is symmetric; the best round is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.layer_scales import agreed_outer, why_not_searched
from octavo.numerics.qtensor import QTensor, quantize, quantize_scale
from octavo.numerics.scale_search import search_scales
from octavo.numerics.scaling import amax, divisor, expand_scale, from_blocks, to_blocks
from octavo.numerics.statistics import Need
from octavo.numerics.weighting import PLAIN
from octavo.spec.steps import Hqq
from octavo.spec.tensor_format import PLAIN_FP32, TensorFormat

_BETA, _GROWTH = 10.0, 1.01  # weight of the quadratic term, and what it grows by every round


class HqqAlgorithm:
    """See the module."""

    needs: frozenset[Need] = frozenset()
    preserves_function = False

    def __init__(self, options: Hqq) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Fix every weight."""
        left: dict[str, str] = {}
        for layer in layers:
            reason = why_not_searched(block, layer, "plain")
            if reason:
                left[layer] = reason
            else:
                weight, fmt = block.read_weight(layer), block.weight_spec(layer).format
                block.fix_weight(layer, half_quadratic(weight, fmt, self.options, agreed_outer(block, layer)))
        return left


@torch.no_grad()
def half_quadratic(weight: Tensor, fmt: TensorFormat, options: Hqq, outer: Tensor | None = None) -> QTensor:
    """``weight`` in ``fmt``, by the error ``sum |e|^p``.

    Args:
        weight: ``(..., out_features, in_features)``.
        fmt: A scaled format without offsets.
        options: See there.
        outer: As for ``search_scales``.
    """
    weight = weight.float()
    top = divisor(amax(weight, fmt.granularity))
    unit = from_blocks(
        to_blocks(torch.ones_like(weight), fmt.granularity)[0]
        * expand_scale(top, fmt.granularity, tuple(weight.shape)),
        fmt.granularity,
        tuple(weight.shape),
    )
    scale, points = search_scales(weight, fmt, PLAIN, outer=outer)
    best, least = quantize(weight, fmt, scale=scale, zero_point=points), float("inf")
    candidate = best
    for round_ in range(options.iterations):
        error = (weight - candidate.dequantize()) / unit
        cost = float(error.abs().pow(options.p).sum())
        if cost < least:
            best, least = candidate, cost
        outliers = _shrunk(error, _BETA * _GROWTH**round_, options.p) * unit
        candidate = _refitted(weight, weight - outliers, candidate)
    return best


def _shrunk(error: Tensor, beta: float, p: float) -> Tensor:
    """Generalized soft-thresholding: what of the error counts as an outlier."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(p - 1) / beta).clamp(min=0)


def _refitted(weight: Tensor, target: Tensor, now: QTensor) -> QTensor:
    """New zero points, or scales, for ``target`` with the codes of ``now``; then the codes nearest to ``weight``."""
    fmt, shape = now.format, now.shape
    assert fmt.scale is not None
    scale = now.scale.dequantize() if isinstance(now.scale, QTensor) else now.scale
    assert scale is not None
    blocks, dims = to_blocks(target, fmt.granularity)
    unscaled = QTensor(
        now.codes, torch.ones_like(scale), replace(fmt, scale=PLAIN_FP32), shape, now.zero_point
    ).dequantize()
    steps, _ = to_blocks(unscaled, fmt.granularity)
    if fmt.zero_point is not None and now.zero_point is not None:
        shift = (steps - blocks / expand_scale(divisor(scale), fmt.granularity, shape)).mean(dims)
        points = (now.zero_point.float() + shift).round()
        points = points.clamp(fmt.zero_point.min_code, fmt.zero_point.max_code).to(now.zero_point.dtype)
        return quantize(weight, fmt, scale=now.scale, zero_point=points)
    fitted = (steps * blocks).sum(dims) / divisor(steps.square().sum(dims))
    fitted = torch.where(fitted * scale > 0, fitted, scale)
    outer = now.scale.scale if isinstance(now.scale, QTensor) else None
    stored = quantize_scale(fitted, fmt.scale, scale=outer) if outer is not None else quantize_scale(fitted, fmt.scale)
    return quantize(weight, fmt, scale=stored)
