"""Choices that a forward pass makes (which experts a token is sent to), noted, and made again in another pass.

Where two values are as good as equal, rounding decides which is the largest, and what follows is something else. Two
passes are compared, up to rounding, with the choices of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
_ARGMAX = (torch.argmax, Tensor.argmax)


class Choices(TorchFunctionMode):
    """While open, notes the results of ``topk`` and ``argmax``.

    Args:
        before: Of another pass, whose choices are made again; a choice of another shape stays as it is.
    """

    def __init__(self, before: Choices | None = None) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._before = None if before is None else before.made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _ARGMAX:
            return self._again(output)
        if func in _TOPK:
            indices = self._again(output[1])
            if indices is not output[1]:
                x = args[0] if args else kwargs["input"]
                axis = kwargs.get("dim", args[2] if len(args) > 2 else -1)
                return torch.return_types.topk((x.gather(axis, indices), indices))  # type: ignore[attr-defined]
        return output

    def _again(self, indices: Tensor) -> Tensor:
        number = len(self.made)
        self.made.append(indices)
        if self._before is None or number >= len(self._before) or self._before[number].shape != indices.shape:
            return indices
        return self._before[number]
