"""What a module had before it was quantized, in a child of it: it moves with the model and is in no state dict."""

from __future__ import annotations

from typing import Any

from torch import nn


class Waiting(nn.Module):
    """Parameters and buffers out of sight of ``state_dict``."""

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: whoever saves a quantized model saves what computes."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is expected there."""
