"""SVDQuant (arXiv:2411.05007): a low-rank branch in full precision takes the part of a weight that rounds worst.

The branch is the best one for the outputs: with ``G = L L^T`` the Gram matrix of the inputs, ``|(W - B A) X|`` is least
where ``B A L`` is the truncated singular value decomposition of ``W L``, found at random with a fixed seed
(Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4). ``iterations`` alternate: the branch then takes
``W - Q(W - B A)`` on top, and the best round is kept. What is left of the weight stays for the steps that follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.numerics.block import Block
from octavo.numerics.layer_scales import why_not_searched
from octavo.numerics.linalg import factor, low_rank, output_error, right_divided
from octavo.numerics.qtensor import fake_quantize
from octavo.numerics.statistics import Need
from octavo.spec.steps import SvdQuant
from octavo.spec.tensor_format import TensorFormat

_DAMPING = 0.01


class SvdQuantAlgorithm:
    """See the module."""

    needs = frozenset({Need.SAMPLED_GRAM})
    preserves_function = True

    def __init__(self, options: SvdQuant) -> None:
        self.options = options

    def apply(self, block: Block, layers: Sequence[str]) -> dict[str, str]:
        """Split every weight in two."""
        left: dict[str, str] = {}
        for layer in layers:
            reason = why_not_searched(block, layer, "gram")
            weight = block.read_weight(layer)
            if not reason and not block.takes_low_rank(layer):
                reason = "only linear layers without a branch get one"
            if not reason and min(weight.shape[-2:]) <= self.options.rank:
                reason = f"a weight of shape {tuple(weight.shape)} is no larger than rank {self.options.rank}"
            if reason:
                left[layer] = reason
                continue
            gram = block.statistics(layer).expected_gram
            a, b = branch(weight.float(), gram, block.weight_spec(layer).format, self.options)
            a, b = a.to(weight.dtype), b.to(weight.dtype)
            block.set_low_rank(layer, a, b)
            block.write_weight(layer, weight.float() - b.float() @ a.float())
        return left


def branch(weight: Tensor, gram: Tensor, fmt: TensorFormat, options: SvdQuant) -> tuple[Tensor, Tensor]:
    """The branch of a weight ``(out_features, in_features)``.

    Returns:
        ``(rank, in_features)`` and ``(out_features, rank)``, fp32.
    """
    lower = factor(gram, _DAMPING)
    target, best, least = weight, None, float("inf")
    for _ in range(options.iterations):
        left, right = low_rank((target.double() @ lower).float(), options.rank)
        a, b = right_divided(right, lower), left
        rest = fake_quantize(weight - b @ a, fmt)
        error = float(output_error(rest + b @ a - weight, gram))
        if best is None or error < least:
            best, least = (a, b), error
        target = weight - rest
    assert best is not None
    return best
