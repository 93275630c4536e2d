"""Rounding that looks at outputs: an error in one column is made up for by the columns still to come.

Legend: I inputs, O outputs; inside, weights are ``(in_features, out_features)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.numerics.linalg import damped, feedback
from octavo.numerics.qtensor import QTensor
from octavo.numerics.scaling import divisor
from octavo.numerics.weight_grid import WeightGrid
from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class Feedback:
    """How columns are visited.

    Args:
        damping: Added to the Gram matrix, as a share of its mean diagonal.
        act_order: Columns with the most energy first; otherwise as they are stored.
        block_size: Columns whose errors are handed on together.
        sweeps: Rounds of coordinate descent afterwards.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    sweeps: int = 0


@torch.no_grad()
def round_with_feedback(
    weight: Tensor,
    gram: Tensor,
    fmt: TensorFormat,
    *,
    scale: Tensor | QTensor,
    zero_point: Tensor | None = None,
    options: Feedback = Feedback(),
) -> QTensor:
    """``weight`` in ``fmt`` so that outputs err little: GPTQ, then coordinate descent.

    Frantar et al., GPTQ (arXiv:2210.17323), equations 2 and 3 in the lazy batches of section 3.3, with scales fixed
    beforehand, so that storage keeps its order whatever the order of visits.

    Args:
        weight: ``(out_features, in_features)``.
        gram: ``(in_features, in_features)`` ``X^T X`` of the inputs, in any scale.
        fmt: The format.
        scale: Scales, of its own format or real-valued where that is fp32; coordinate descent may replace them.
        zero_point: Zero points of an asymmetric format.
        options: See there.
    """
    grid = WeightGrid.of(tuple(weight.shape), fmt, scale, zero_point)
    weight_IO = weight.float().T.contiguous()
    rounded, damping = _hand_on(weight_IO, gram, grid, options)
    if options.sweeps:
        _descend(weight_IO, rounded, gram, grid, replace(options, damping=damping))
    return grid.codes(rounded)


def _hand_on(weight_IO: Tensor, gram: Tensor, grid: WeightGrid, options: Feedback) -> tuple[Tensor, float]:
    """What GPTQ finds, and the damping that the Gram matrix took."""
    width = weight_IO.shape[0]
    order = torch.arange(width, device=gram.device)
    if options.act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    upper, damping = feedback(gram[order][:, order], options.damping)
    columns, left, rounded = order.tolist(), weight_IO[order], torch.empty_like(weight_IO)
    for start in range(0, width, options.block_size):
        stop = min(start + options.block_size, width)
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            nearest = grid.nearest(left[at], columns[at])
            rounded[columns[at]] = nearest
            errors[at - start] = error = (left[at] - nearest) / upper[at, at]
            left[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded, damping


def _descend(weight_IO: Tensor, rounded: Tensor, gram: Tensor, grid: WeightGrid, options: Feedback) -> None:
    """Coordinate descent on ``tr(E G E^T)`` from ``rounded``, in place.

    With everything else fixed the best code of a column has a closed form (QuantEase, arXiv:2309.01885, equation 8),
    and so has the best scale of a group: a weighted least-squares fit, whose nearest storable value is the best one
    because the loss is a parabola.
    """
    gram = damped(gram, options.damping).float()
    pull = gram @ (weight_IO - rounded)  # half the gradient, downhill
    codes = rounded / divisor(grid.scale_IO)
    size = grid.group_size if grid.has_free_scales else options.block_size
    for _ in range(options.sweeps):
        for start in range(0, weight_IO.shape[0], size):
            columns = slice(start, min(start + size, weight_IO.shape[0]))
            before = rounded[columns].clone()
            if grid.has_free_scales:
                _refit_scale(codes, rounded, gram, pull, grid, columns)
            _redo_codes(codes, rounded, gram, pull, grid, columns)
            elsewhere = gram[:, columns] @ (rounded[columns] - before)
            elsewhere[columns] = 0  # already there
            pull -= elsewhere


def _refit_scale(codes: Tensor, rounded: Tensor, gram: Tensor, pull: Tensor, grid: WeightGrid, columns: slice) -> None:
    """The best scale of one group of columns for its codes; ``pull`` inside the group follows."""
    inside, block, now = codes[columns], gram[columns, columns], grid.scale_IO[columns][0]
    size = (inside * (block @ inside)).sum(0)
    wanted = grid.storable(now + (inside * pull[columns]).sum(0) / divisor(size))
    wanted = torch.where((size > 0) & (wanted * now > 0), wanted, now)
    change = inside * (wanted - now)
    pull[columns] -= block @ change
    rounded[columns] = inside * wanted
    grid.scale_IO[columns] = wanted


def _redo_codes(codes: Tensor, rounded: Tensor, gram: Tensor, pull: Tensor, grid: WeightGrid, columns: slice) -> None:
    """The best code of every column in turn; ``pull`` inside follows."""
    block, inside = gram[columns, columns], pull[columns]
    for at in range(block.shape[0]):
        column = columns.start + at
        code = grid.nearest_codes(rounded[column] + inside[at] / block[at, at], column)
        new = code * grid.scale_IO[column]
        inside.addr_(block[at], new - rounded[column], alpha=-1)
        codes[column], rounded[column] = code, new
