"""What algorithms put beside a layer's quantizers: what is done to its input, and a low-rank branch.

Both are child modules of the layer, like its quantizers; layers that read the same tensor hold the same
``InputTransform``, which computes once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.quantizer import Mode, SharedInput
from octavo.numerics.hadamard import hadamard

INPUT_TRANSFORM = "input_transform"
LOW_RANK = "low_rank"


class InputTransform(nn.Module):
    """Divides a layer's input by a vector, then rotates it.

    Args:
        num_channels: Channels of the input.
        axis: Where they are, from the end: -1 for linear layers.
        num_readers: Layers that hold this module; 1 where a function computes with it, which may happen often.
    """

    pre_scale: Tensor | None
    matrix: Tensor | None

    def __init__(self, num_channels: int, axis: int, num_readers: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.axis = axis
        self.rotation = 0
        self.register_buffer("pre_scale", None)
        self.register_buffer("matrix", None, persistent=False)
        self.memory = SharedInput("", num_readers, None)

    def divide(self, scale: Tensor) -> None:
        """Divide by ``scale`` in addition to what was before; not after a rotation."""
        assert not self.rotation, "a scale comes before a rotation"
        scale = scale.float()
        self.pre_scale = scale.clone() if self.pre_scale is None else self.pre_scale * scale

    def rotate(self, block_size: int, device: torch.device) -> None:
        """Rotate every ``block_size`` neighbours."""
        assert not self.rotation, "one rotation only"
        self.rotation = block_size
        self.matrix = hadamard(block_size).to(device) / math.sqrt(block_size)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the layer computes with it, before rounding."""
        if self.memory.num_readers < 2 or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._compute(x)
        return self.memory.get(x, Mode.OFF, self._compute)

    def _compute(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.pre_scale is not None:
            y = y / self.pre_scale.view(-1, *(1 for _ in range(-1 - self.axis)))
        if self.matrix is not None:
            rows = y.movedim(self.axis, -1)
            y = (rows.unflatten(-1, (-1, self.rotation)) @ self.matrix).flatten(-2).movedim(-1, self.axis)
        return y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputTransform:
        """Moves buffers between devices; never changes their dtype."""
        kept = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            self._buffers[name] = before.to(after.device)
        return self


class LowRank(nn.Module):
    """``x @ a.T @ b.T``, added to a linear layer's output.

    Args:
        a: ``(rank, in_features)``.
        b: ``(out_features, rank)``.
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        """The branch of ``x``, which is what the layer computes with, before rounding."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class StackBranch(LowRank):
    """Low-rank branches beside a stack of weights that a function computes with, in the function's own call.

    What each expert is sent is the function's business, so the branches go with the matrices: ``[Q(W), B A]`` meets
    ``[Q(x), x]``, each twice as wide, however the call is spelled, and ``Q(x) Q(W)^T + x (B A)^T`` comes out.

    Args:
        a: ``(num_matrices, rank, in_features)``.
        b: ``(num_matrices, out_features, rank)``.
        is_transposed: The parameter is ``(num_matrices, in_features, out_features)``.
        axis: The axis of the input's channels in the call, from its end.
    """

    def __init__(self, a: Tensor, b: Tensor, *, is_transposed: bool, axis: int) -> None:
        super().__init__(a, b)
        self.is_transposed = is_transposed
        self.axis = axis

    def beside(self, weight: Tensor) -> Tensor:
        """A rounded parameter with the branches beside its matrices, along the axis of its inputs."""
        product = torch.bmm(self.b.float(), self.a.float()).to(weight.dtype)
        if self.is_transposed:
            return torch.cat([weight, product.transpose(1, 2)], 1)
        return torch.cat([weight, product], 2)

    def join(self, rounded: Tensor, x: Tensor) -> Tensor:
        """An input as it is rounded, and beside it as it was."""
        return torch.cat([rounded, x], self.axis)


class Listener(nn.Module):
    """Stands in for an ``InputTransform`` while data are gathered: tells of every input, and passes it on."""

    def __init__(self, hear: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.hear = hear

    def forward(self, x: Tensor) -> Tensor:
        """``x``, heard."""
        self.hear(x)
        return x
