"""What weights can make up for when quantized layers before them have moved their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.numerics.linalg import factor
from octavo.numerics.statistics import InputStatistics

_ROWS_ALIKE = 2.0
"""Rows of one text know of each other: so many tell as much as one."""


def compensated(weight: Tensor, known: InputStatistics, damping: float, *, part: float = 1.0) -> Tensor:
    """The weight that serves drifted inputs best, before any rounding.

    With ``x`` the inputs of the unquantized model and ``y`` those that the quantized layers before give, the minimum
    of ``|X W^T - Y V^T|^2 + ridge |V - W|^2`` is ``V = W + W D (G + ridge)^-1`` with ``D = (X - Y)^T Y`` and
    ``G = Y^T Y``: the asymmetric calibration of GPTAQ (arXiv:2504.02692) in closed form.

    That is a regression with a coefficient for every channel, and some of what it explains is luck of the rows that
    were seen. Each output's step is therefore shortened as James and Stein do it (positive part; Efron and Morris,
    1973): to the share ``1 - c u / e``, where ``e`` is what the step explains of the squared drift of the output,
    ``u`` what it leaves, and ``c`` channels over the rows that are left. With few rows little of the step remains, and
    nothing with no more rows than channels.

    Where the drift is noise (an input's own rounding), the step gives way in directions that hold much noise and little
    signal. What it takes from the signal there is lost in every row alike, while noise differs from row to row and
    averages out in later layers: the least squared error of one layer is then not the best for the model. Half of the
    step (``part``) takes three quarters of what all of it gains, at half the loss of signal.

    Args:
        weight: ``(out_features, in_features)``.
        known: ``gram``, ``cross`` and ``drift`` of the layer's input.
        damping: Ridge, as a share of the mean diagonal of ``G``.
        part: Of the step.

    Returns:
        fp32 of ``weight``'s shape.
    """
    assert known.gram is not None, "GRAM was not asked for"
    assert known.cross is not None, "CROSS was not asked for"
    assert known.drift is not None, "CROSS was not asked for"
    mean = known.gram.double().diagonal().mean()
    finite = all(bool(part.isfinite().all()) for part in (known.gram, known.cross, known.drift))
    rows_left = known.num_gram_rows - weight.shape[1]
    if not finite or not bool(mean > 0) or rows_left <= 0:
        return weight.float()
    gram, drift, before = known.gram.double() / mean, known.drift.double() / mean, weight.double()
    pull = before @ ((known.cross - known.gram).double() / mean)
    step = torch.cholesky_solve(pull.T, factor(known.gram, damping)).T
    explained = 2 * (step * pull).sum(1) - ((step @ gram) * step).sum(1)
    unexplained = (((before @ drift) * before).sum(1) - explained).clamp(min=0)
    noise = _ROWS_ALIKE * weight.shape[1] / rows_left * unexplained
    share = 1 - noise / explained.clamp(min=torch.finfo(torch.float64).tiny)
    return (before + part * step * share.clamp(0, 1).unsqueeze(1)).float()
