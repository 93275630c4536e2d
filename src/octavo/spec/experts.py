"""Words about experts: formats of stacked weights, and what becomes of experts that calibration hardly reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from octavo.errors import UserError
from octavo.spec.granularity import PerFlatGroup, PerToken
from octavo.spec.tensor_format import PerChannel, PerTensor, Shape, TensorFormat

if TYPE_CHECKING:
    from octavo.spec.plan import Plan


class RarePolicy(Enum):
    """What becomes of experts that calibration hardly reaches."""

    ERROR = "error"  # calibration fails and names them
    ALL_TOKENS = "all-tokens"  # while calibrating every expert computes every token
    SHARE = "share"  # they get the input ranges of all experts of their layer together


@dataclass(frozen=True, slots=True)
class ExpertsPolicy:
    """How experts are calibrated.

    Args:
        rare: What becomes of experts that see fewer than ``tokens`` tokens.
        tokens: The least number of tokens; experts that see fewer are hardly reached.
    """

    rare: RarePolicy = RarePolicy.SHARE
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"calibration expert_tokens is {self.tokens}: it must be at least 1")

    @classmethod
    def of(cls, rare: str, tokens: int) -> ExpertsPolicy:
        """The policy of this name.

        Raises:
            UserError: there is none.
        """
        known = [policy.value for policy in RarePolicy]
        if rare not in known:
            raise UserError(f"calibration experts is {rare!r}: it is one of {', '.join(known)}")
        return cls(RarePolicy(rare), tokens)

    def to_dict(self) -> dict[str, Any]:
        """As a recipe file has it."""
        return {"experts": self.rare.value, "expert_tokens": self.tokens}

    def __str__(self) -> str:
        match self.rare:
            case RarePolicy.ERROR:
                return f"calibration fails when an expert sees fewer than {self.tokens} tokens"
            case RarePolicy.ALL_TOKENS:
                return "while calibrating every expert computes every token, which costs time"
            case RarePolicy.SHARE:
                return f"an expert that sees fewer than {self.tokens} tokens gets the input ranges of all its siblings"


def rare_experts(plan: Plan, tokens: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """One sentence for each layer some of whose experts saw few tokens, and what was done about it."""
    policy = plan.experts
    if policy is None:
        return ()
    few = {name: sum(count < policy.tokens for count in counts) for name, counts in tokens.items()}
    return tuple(
        f"{number} of {len(tokens[name])} experts of '{name}' saw fewer than {policy.tokens} tokens "
        f"(experts: {policy.rare.value})"
        for name, number in few.items()
        if number
    )


def format_of_matrix(fmt: TensorFormat) -> TensorFormat | None:
    """The format of one matrix of a stack in ``fmt``; ``None`` where scales are not each of one matrix.

    >>> from octavo.spec.formats import FORMATS
    >>> format_of_matrix(format_for(FORMATS["nvfp4"], (4, 8, 16))) == FORMATS["nvfp4"]
    True
    """
    if isinstance(fmt.granularity, PerFlatGroup | PerToken):
        return None
    scale = None if fmt.scale is None else format_of_matrix(fmt.scale)
    offset = None if fmt.offset is None else format_of_matrix(fmt.offset)
    if (scale is None) != (fmt.scale is None) or (offset is None) != (fmt.offset is None):
        return None
    granularity = PerTensor() if fmt.granularity == PerChannel(0) else fmt.granularity
    return replace(fmt, granularity=granularity, scale=scale, offset=offset)


def format_for(fmt: TensorFormat, shape: Shape) -> TensorFormat:
    """``fmt`` for a weight of ``shape``: in a stack of matrices what is per tensor becomes per matrix.

    >>> from octavo.spec.formats import FORMATS
    >>> str(format_for(FORMATS["e4m3-tensor"], (4, 8, 16))), str(format_for(FORMATS["e4m3-tensor"], (8, 16)))
    ('e4m3 per matrix', 'e4m3 per tensor')
    """
    if len(shape) <= 2 or fmt.scale is None:
        return fmt
    granularity = PerChannel(len(shape) - 3) if isinstance(fmt.granularity, PerTensor) else fmt.granularity
    return replace(fmt, granularity=granularity, scale=format_for(fmt.scale, shape))
