"""What a backend is: a faster way to the same bits. A refusal carries its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a backend takes a job, and if not, why."""

    ok: bool
    reason: str = ""


class Backend(Protocol):
    """Rounds tensors as ``numerics.qtensor.fake_quantize`` does, bit for bit, only faster."""

    name: str

    def supports(self, x: Tensor, fmt: TensorFormat) -> Support:
        """Whether ``fake_quantize`` takes ``x`` in ``fmt``."""
        ...

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values to real values on the grid.

        Args:
            x: Any shape, floating point.
            scale: fp32, of ``fmt.granularity.scale_shape(x.shape)``.
            zero_point: Integers of the scale's shape, ``None`` when symmetric.
        """
        ...
