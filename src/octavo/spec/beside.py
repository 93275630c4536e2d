"""What algorithms leave beside a layer: as planned, as far as steps say, and as it came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.spec.facts import SiteFacts


@dataclass(frozen=True, slots=True)
class Beside:
    """Counts of values.

    Args:
        num_scales: In the vector that divides the input, fp32; 0 where it was folded, or there is none.
        rank: Of a low-rank branch, or of those beside each matrix of a stack; values are as wide as the weight's.
        num_biases: In a bias that the layer had not.
        rotation: Block size of the rotation of the input, which needs no values; 0 for none.
    """

    num_scales: int = 0
    rank: int = 0
    num_biases: int = 0
    rotation: int = 0

    def num_bytes(self, site: SiteFacts) -> int:
        """Bytes beside a site's own parameters."""
        total = sum(site.parameters.values())
        width = site.parameter_bytes / total if total else 0
        factors = self.rank * sum(site.weight_shape[-2:]) * math.prod(site.weight_shape[:-2])
        return 4 * self.num_scales + round((factors + self.num_biases) * width)

    def to_dict(self) -> dict[str, int]:
        """What is not 0."""
        values = {"num_scales": self.num_scales, "rank": self.rank, "num_biases": self.num_biases}
        return {name: value for name, value in {**values, "rotation": self.rotation}.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Beside:
        """What ``to_dict`` wrote."""
        return cls(**data)


NOTHING = Beside()
