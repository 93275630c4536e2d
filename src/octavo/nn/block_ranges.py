"""Ranges of a block's quantizers: what is observed while forwards run, what follows from statistics, what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from octavo.nn.block_parts import BlockParts
from octavo.nn.fusion import Member, fixed_outers, shared_amaxes
from octavo.nn.heard import Heard
from octavo.nn.quantizer import ActivationQuantizer, Mode, Quantizer, new_observer
from octavo.numerics.observers import AbsMaxObserver


class BlockRanges:
    """Of one block.

    Args:
        parts: Of the block.
        heard: Statistics of inputs; a range that they tell is not observed a second time.
        fused: Names of layers that engines join, group by group.
    """

    def __init__(self, parts: BlockParts, heard: Heard, fused: Sequence[Sequence[str]]) -> None:
        self._parts, self._heard, self._fused = parts, heard, fused

    def observing(self, quantizer: Quantizer) -> Mode:
        """Its mode while statistics are gathered."""
        if not isinstance(quantizer, ActivationQuantizer) or quantizer.spec.is_dynamic:
            return Mode.OFF
        return Mode.OFF if self._follows(quantizer) else Mode.OBSERVE

    def observe_again(self, run_all: Callable[[], None], *, has_folded: bool) -> None:
        """Ranges of what steps have changed: from the statistics where they tell, else by one more pass.

        Args:
            run_all: Every batch through the block.
            has_folded: Factors were moved into what makes inputs.
        """
        waiting = []
        for q in self._static():
            known = self._heard.statistics(self._follows(q)) if self._follows(q) else None
            if known is not None and known.count and known.low is not None and known.high is not None:
                assert isinstance(q.observer, AbsMaxObserver)
                q.observer.low, q.observer.high = float(known.low.min()), float(known.high.max())
                q.observer.count = known.count
            elif self._is_changed(q, has_folded=has_folded):
                waiting.append(q)
        fresh: dict[int, Any] = {}
        for q in waiting:
            q.observer = fresh.setdefault(id(q.shared or q), new_observer(q.spec))
        if waiting:
            with self._parts.modes(lambda q: Mode.OBSERVE if q in waiting else Mode.OFF):
                run_all()

    def finish(self) -> Mapping[str, str]:
        """Quantize inputs and results from now on; returns quantizers that stay off, with the reason."""
        off = {q.name: why for q in self._static() if (why := q.finish())}
        for q in self._parts.quantizers:
            if isinstance(q, ActivationQuantizer) and q.spec.is_dynamic:
                q.mode = Mode.QUANTIZE
        return off

    def _static(self) -> list[ActivationQuantizer]:
        return [q for q in self._parts.quantizers if isinstance(q, ActivationQuantizer) and not q.spec.is_dynamic]

    def find(self, names: Iterable[str]) -> None:
        """Ranges of weights; those that engines join agree on the scale of their scales."""
        fused = self._fused_members()
        shared, known = shared_amaxes(fused), fixed_outers(fused)
        for name in names:
            layer = self._parts.layers[name]
            layer.quantizer.find_range(layer.parameter, shared.get(layer.quantizer), known.get(layer.quantizer))

    def rounding_error(self, name: str) -> Tensor:
        """``(..., out_features, in_features)`` error of rounding a weight that is not fixed, with the range found."""
        layer = self._parts.layers[name]
        before = layer.quantizer.mode
        self.find([name])
        rounded = layer.quantizer.view.to_matrix(layer.quantizer(layer.parameter.detach()))
        layer.quantizer.mode = before
        return rounded.float() - layer.matrix.float()

    def _fused_members(self) -> list[list[Member]]:
        groups = [[self._parts.layers[name] for name in names if name in self._parts.layers] for names in self._fused]
        return [[(x.quantizer, x.parameter) for x in group] for group in groups]

    def _follows(self, quantizer: ActivationQuantizer) -> str:
        """The layer whose statistics tell the quantizer's range; empty for none."""
        name = quantizer.name.rpartition(".")[0]
        layer = self._parts.layers.get(name)
        if layer is None or layer.input_quantizer is not quantizer or not layer.is_linear:
            return ""
        return name if isinstance(quantizer.observer, AbsMaxObserver) else ""

    def _is_changed(self, quantizer: ActivationQuantizer, *, has_folded: bool) -> bool:
        layer = self._parts.layers.get(quantizer.site)
        if layer is not None and layer.input_quantizer is quantizer:
            return layer.transform is not None or bool(self._follows(quantizer)) or has_folded
        return has_folded
