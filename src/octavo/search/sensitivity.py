"""What each quantizer alone costs: all others off, one on, and a score."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from octavo.numerics.door import Door
from octavo.report.progress import Track, silent


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One quantizer and what it alone costs.

    Args:
        quantizer: Full name.
        score: The metric with only this quantizer on.
        cost: How much worse than with all quantizers off; larger is worse, whatever the metric.
    """

    quantizer: str
    score: float
    cost: float


def rank_quantizers(
    door: Door,
    score: Callable[[], float],
    *,
    higher_is_better: bool,
    only: Callable[[str], bool] = lambda name: True,
    track: Track = silent,
) -> list[Sensitivity]:
    """Every quantizer by what it alone costs, the worst first; equals in model order.

    Args:
        door: A calibrated model.
        score: Runs the model and judges it.
        higher_is_better: Direction of the score.
        only: Quantizer names to look at.
        track: Told of every quantizer.
    """
    names = [name for name in door.quantizer_names() if only(name)]
    with door.disabled(lambda name: True):
        ideal = score()
    rows = []
    for name in track(names, "sensitivity"):
        with door.disabled(partial(operator.ne, name)):
            value = score()
        rows.append(Sensitivity(name, value, ideal - value if higher_is_better else value - ideal))
    return sorted(rows, key=lambda row: -row.cost)
