"""What a backend is: a faster way to the same bits. A refusal carries its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.numerics.loops import Loops
from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a backend takes a job, and if not, why."""

    ok: bool
    reason: str = ""


class Backend(Loops, Protocol):
    """``numerics.loops.Loops`` bit for bit, only faster, for what it supports."""

    name: str

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Whether the loops take ``x`` in ``fmt``. Asked anew at every tensor: the answer may change."""
        ...
