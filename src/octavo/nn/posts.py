"""Where what a layer reads can be heard: in front of the layer, at its quantizer, or in calls of functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from octavo.nn.block_layers import BlockLayer
from octavo.nn.ears import Ears
from octavo.nn.extras import INPUT_TRANSFORM, Listener
from octavo.nn.hearing import Hearing
from octavo.nn.quantizer import Quantizer
from octavo.numerics.block import matrix_name


class Posts:
    """Listens in a block.

    Args:
        root: The module that the block is, or the model.
        stacked: Layers that are stacks of matrices.
    """

    def __init__(self, root: nn.Module, stacked: AbstractSet[str]) -> None:
        self._root = root
        self._stacked = stacked

    @contextmanager
    def listening(self, ears: Ears, *, after: bool = False) -> Iterator[None]:
        """While open, ``ears`` are told of every input of their layers; ``after`` as in ``heard_by``."""
        hidden = [layer for layer in ears.layers.values() if not layer.is_plain and self._is_hidden(layer)]
        with ExitStack() as cleanup:
            for name, layer in ears.layers.items():
                if layer not in hidden:
                    cleanup.enter_context(self.heard_by(layer, partial(ears.hear, name), after=after))
            if hidden:
                cleanup.enter_context(Hearing(hidden, partial(self._hear_part, ears)))
            yield

    def _is_hidden(self, layer: BlockLayer) -> bool:
        """No module is called with what it reads, or with what each of its matrices reads."""
        return layer.name in self._stacked or (layer.is_linear and self.place_of(layer.input_quantizer) is None)

    @staticmethod
    def _hear_part(ears: Ears, layer: BlockLayer, index: int, x: Tensor, rows: Tensor) -> None:
        ears.hear_part(layer.name if index < 0 else matrix_name(layer.name, index), x, index, rows)

    @contextmanager
    def heard_by(self, layer: BlockLayer, hear: Callable[[Tensor], None], *, after: bool = False) -> Iterator[None]:
        """While open, ``hear`` is told of every input of a layer, as far as anything there can be told.

        ``after``: as scales and rotations in front of the layer have made it.
        """
        home, child = layer.holder, INPUT_TRANSFORM
        ear: nn.Module = Listener(hear)
        if not layer.is_plain:
            place = self.place_of(layer.input_quantizer)
            if place is None:
                yield
                return
            home, child = place
            ear = nn.Sequential(ear, home._modules[child])
        kept = home._modules.get(child)
        home._modules[child] = nn.Sequential(kept, ear) if after and layer.is_plain and kept is not None else ear
        try:
            yield
        finally:
            if kept is None:
                del home._modules[child]
            else:
                home._modules[child] = kept

    def place_of(self, quantizer: Quantizer | None) -> tuple[nn.Module, str] | None:
        """Whose child a quantizer is, and by which name."""
        for module in self._root.modules():
            for name, child in module._modules.items():
                if quantizer is not None and child is quantizer:
                    return module, name
        return None
