"""The algorithms by the names of their steps.

How an algorithm is added:

1. Its options: a class in ``octavo.spec.steps`` and a line in ``STEPS`` there.
2. Its mathematics: pure functions on tensors (``octavo.numerics``, or in the algorithm's own file), with the paper and
   the equation, and tests that need no model.
3. Its adapter: a class here beside, one file for each, which no other algorithm imports. It is made with its options
   and is an ``octavo.calibrate.algorithm.Algorithm``::

       class GptqAlgorithm:
           needs = frozenset({Need.GRAM})
           preserves_function = False

           def __init__(self, options: Gptq) -> None:
               self.options = options

           def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
               for layer in layers:
                   gram = block.statistics(layer).gram
                   codes = solve(block.read_weight(layer), gram, block.weight_spec(layer).format, ...)
                   block.fix_weight(layer, codes)
               return {}

4. A line in ``ALGORITHMS``. The battery ``tests/contracts/test_algorithms.py`` picks it up.

What an adapter can rely on:

- ``block.statistics(layer)`` are of what the weight meets *now*: scales and rotations that earlier steps set are in
  them, and in ``read_weight``. After ``set_pre_scale(group, s)`` both have changed.
- ``set_pre_scale`` keeps the function by itself: it divides the input and multiplies the weights' columns. For scales
  per channel walk over ``block.scale_groups()``, take only groups that take a scale and all of whose layers are among
  ``layers`` (``Readings`` knows what each of them reads: experts get rows of their own), and give what
  ``group.tie(scale)`` returns. ``group.per_column`` turns a value per channel into one per weight column.
- A weight that ``fix_weight`` got stays as it is. Nothing may change its input afterwards; steps that scale or rotate
  come first. What no step fixed is rounded to nearest at the end, with the range that the rule's observer finds.
- ``needs`` are gathered once for all steps of the recipe, before the first one works on the block. ``SAMPLED_GRAM`` is
  cheaper than ``GRAM``; with ``QUANTIZED`` inputs come through the quantized blocks before (unless the recipe says
  otherwise), which costs one more forward.
- The same input gives the same bytes: no random numbers without a seed of their own.
- A layer that cannot be served (no Gram matrix of a grouped convolution, say) is named in what ``apply`` returns, with
  the reason; it is then rounded to nearest, and the user is told. What must not happen is an error, with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from octavo.algorithms.awq import AwqAlgorithm
from octavo.algorithms.bias_correction import BiasCorrectionAlgorithm
from octavo.algorithms.double_quantization import DoubleQuantizationAlgorithm
from octavo.algorithms.equalize import EqualizeAlgorithm
from octavo.algorithms.gptq import GptqAlgorithm
from octavo.algorithms.hqq import HqqAlgorithm
from octavo.algorithms.learned_rounding import LearnedRoundingAlgorithm
from octavo.algorithms.rotate import RotateAlgorithm
from octavo.algorithms.scale_search import ScaleSearchAlgorithm
from octavo.algorithms.smoothquant import SmoothQuantAlgorithm
from octavo.algorithms.svdquant import SvdQuantAlgorithm
from octavo.calibrate.algorithm import Algorithm
from octavo.spec.steps import (
    Awq,
    BiasCorrection,
    DoubleQuantization,
    Equalize,
    Gptq,
    Hqq,
    LearnedRounding,
    Options,
    Rotate,
    ScaleSearch,
    SmoothQuant,
    Step,
    SvdQuant,
)

ALGORITHMS: dict[type[Options], Callable[[Any], Algorithm]] = {
    DoubleQuantization: DoubleQuantizationAlgorithm,
    Equalize: EqualizeAlgorithm,
    Awq: AwqAlgorithm,
    Rotate: RotateAlgorithm,
    SvdQuant: SvdQuantAlgorithm,
    ScaleSearch: ScaleSearchAlgorithm,
    Hqq: HqqAlgorithm,
    Gptq: GptqAlgorithm,
    LearnedRounding: LearnedRoundingAlgorithm,
    SmoothQuant: SmoothQuantAlgorithm,
    BiasCorrection: BiasCorrectionAlgorithm,
}


def make_algorithms(steps: Sequence[Step]) -> list[tuple[Step, Algorithm]]:
    """Each step with its algorithm, in order."""
    return [(step, ALGORITHMS[type(step.options)](step.options)) for step in steps]
