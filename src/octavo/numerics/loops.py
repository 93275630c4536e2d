"""The passes over a whole tensor, which are worth a faster implementation: everything else is about scales."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.spec.element import ElementFormat
from octavo.spec.tensor_format import Granularity, TensorFormat


class Loops(Protocol):
    """A faster way to the bits of ``scaling`` and ``qtensor``, which take one as an argument and need none."""

    def amax(self, x: Tensor, granularity: Granularity) -> Tensor:
        """See ``scaling.amax``."""
        ...

    def min_max(self, x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """See ``scaling.min_max``."""
        ...

    def scales(self, x: Tensor, fmt: TensorFormat, outer: Tensor | None) -> Tensor | None:
        """Scales of a symmetric format that cover ``x``, as ``qtensor.stored_scale`` gives them.

        Args:
            x: Any shape, floating point, not empty.
            fmt: Scaled, without an offset.
            outer: The scale of its scales where they have one and it is known.

        Returns:
            fp32 of the scale's shape; ``None`` where this is no faster.
        """
        ...

    def fake_quantize(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values to real values on the grid.

        Args:
            x: Any shape, floating point, not empty.
            fmt: Scaled, without an offset. Its scales' own format does not matter: they are here.
            scale: fp32, as stored, of ``fmt.granularity.scale_shape(x.shape)``.
            zero_point: Integers of the scale's shape, ``None`` when symmetric.

        Returns:
            Shape and dtype of ``x``.
        """
        ...

    def codes(self, x: Tensor, fmt: TensorFormat, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The codes of what ``fake_quantize`` finds, in the shape of ``x`` and the dtype of ``QTensor.codes``."""
        ...

    def squared_error(self, rows_NS: Tensor, scale_N: Tensor, element: ElementFormat) -> Tensor:
        """See ``scaling.squared_error``."""
        ...
