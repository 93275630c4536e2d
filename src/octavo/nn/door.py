"""The torch door: one ``nn.Module`` seen from outside."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.errors import UserError
from octavo.nn import surgery
from octavo.nn.experts import ExpertWatch
from octavo.nn.fusion import Member, shared_amaxes
from octavo.nn.quantizer import ActivationQuantizer, Mode, Quantizer, WeightQuantizer
from octavo.nn.rotations import Rotations
from octavo.nn.sites import Site, find_sites
from octavo.nn.snapshot import TorchSnapshot, stored_parameter
from octavo.nn.state import load_tensors, replace_extras, replace_scales, restore_layers, simulated_extras
from octavo.nn.ties import tie_again
from octavo.nn.walk import Walk
from octavo.numerics.door import RotationFacts
from octavo.numerics.snapshot import LayerSnapshot
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.sources.feeding import feed
from octavo.sources.shapes import SAMPLE_FILE, shapes_of
from octavo.spec.facts import ModelFacts
from octavo.spec.plan import Plan


class TorchDoor:
    """``numerics.door.Door`` for a torch model, which is changed in place.

    Args:
        model: The model.
        source: What the user called it.
        sample: One batch (tensor, tuple or dict) for the traced forward; ``None``: attention calls stay unknown.
    """

    def __init__(self, model: nn.Module, source: str = "", sample: Any = None) -> None:
        self.model = model
        self.source = source or type(model).__name__
        self._sample = sample
        self._known: tuple[ModelFacts, dict[str, Site]] | None = None
        self._plan: Plan | None = None
        self._experts: ExpertWatch | None = None
        self._rotations = Rotations(model)

    def _look(self) -> tuple[ModelFacts, dict[str, Site]]:
        if self._known is None:
            run = None if self._sample is None else lambda: self.run(self._sample)
            facts, sites = find_sites(self.model, self.source, run)
            self._known = facts, {site.facts.name: site for site in sites}
        return self._known

    def facts(self) -> ModelFacts:
        """See ``Door.facts``."""
        return self._look()[0]

    def find_rotations(self, kinds: frozenset[str], *, may_untie: bool) -> RotationFacts:
        """See ``Door.find_rotations``."""
        run = None if self._sample is None else partial(self.run, self._sample)
        with self.evaluating():
            found = self._rotations.find(kinds, run, may_untie=may_untie)
        self._known = None
        return found

    def why_not(self, needs: frozenset[Need]) -> str:
        """See ``Door.why_not``: there is nothing that a block of modules could not give."""
        return ""

    def tie_again(self) -> None:
        """See ``Door.tie_again``."""
        tie_again(self.model)
        self._known = None

    def rotate(self, block: int | str) -> tuple[str, ...]:
        """See ``Door.rotate``."""
        assert self._plan is not None, "prepared"
        with self.evaluating(), self._nothing_rounded():
            return self._rotations.apply(self._plan, block)

    @contextmanager
    def _nothing_rounded(self) -> Iterator[None]:
        modes = {q: q.mode for q in surgery.quantizers(self.model)}
        for quantizer in modes:
            quantizer.mode = Mode.OFF
        try:
            yield
        finally:
            for quantizer, mode in modes.items():
                quantizer.mode = mode

    def prepare(self, plan: Plan) -> None:
        """See ``Door.prepare``."""
        self._prepare(plan, is_folded=False)

    def _prepare(self, plan: Plan, *, is_folded: bool) -> None:
        surgery.insert(self.model, plan, self._look()[1], is_folded=is_folded)
        self._plan = plan
        self._experts = ExpertWatch(self.model, plan.experts) if plan.experts is not None else None

    @torch.no_grad()
    def run(self, batch: Any) -> Any:
        """See ``Door.run``."""
        return feed(self.model, batch)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """See ``Door.observe``. The model is in eval mode meanwhile."""
        modes = {q: q.mode for q in surgery.quantizers(self.model)}
        for quantizer in modes:
            quantizer.was_asked = False
            static = isinstance(quantizer, ActivationQuantizer) and not quantizer.spec.is_dynamic
            quantizer.mode = Mode.OBSERVE if static else Mode.OFF
        try:
            with self.evaluating(), nullcontext() if self._experts is None else self._experts.watch():
                yield
        finally:
            for quantizer, mode in modes.items():
                quantizer.mode = mode

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See ``Door.evaluating``."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def finish_calibration(self) -> Mapping[str, str]:
        """See ``Door.finish_calibration``. Weights are looked at here, once."""
        if self._experts is not None:
            self._experts.settle()
        activations = [q for q in surgery.quantizers(self.model) if isinstance(q, ActivationQuantizer)]
        off = {q.name: why for q in activations if (why := q.finish())}
        weights = dict(weight_quantizers(self.model))
        shared = shared_amaxes(self._fused(weights))
        for quantizer, weight in weights.items():
            quantizer.find_range(weight, shared.get(quantizer))
        return off | self._bypassed(off)

    def _bypassed(self, off: Mapping[str, str]) -> dict[str, str]:
        """Quantizers that the model's code computes past, seen by what others of their site got; they are off now."""
        by_site: dict[str, list[Quantizer]] = {}
        for quantizer in surgery.quantizers(self.model):
            by_site.setdefault(quantizer.site, []).append(quantizer)
        found = [
            quantizer
            for members in by_site.values()
            if any(quantizer.was_asked for quantizer in members)
            for quantizer in members
            if not quantizer.was_asked and quantizer.name not in off
        ]
        for quantizer in found:
            quantizer.mode = Mode.OFF
        why = "the model's code computes past it: hand in a counterpart of the module with octavo.register"
        return {quantizer.name: why for quantizer in found}

    def _fused(self, weights: Mapping[WeightQuantizer, torch.Tensor]) -> list[list[Member]]:
        """Groups of weights that engines join."""
        assert self._plan is not None, "prepared"
        by_site = {quantizer.name.rpartition(".")[0]: (quantizer, weight) for quantizer, weight in weights.items()}
        return [[by_site[name] for name in names if name in by_site] for names in self._plan.fused_weights()]

    def expert_tokens(self) -> Mapping[str, Sequence[int]]:
        """See ``Door.expert_tokens``."""
        return {} if self._experts is None else self._experts.tokens

    def quantizer_names(self) -> Sequence[str]:
        """See ``Door.quantizer_names``; those that stay off are not among them."""
        return [q.name for q in surgery.quantizers(self.model) if q.mode is Mode.QUANTIZE]

    @contextmanager
    def disabled(self, names: Callable[[str], bool]) -> Iterator[None]:
        """See ``Door.disabled``."""
        changed: list[Quantizer] = []
        for quantizer in surgery.quantizers(self.model):
            if quantizer.mode is Mode.QUANTIZE and names(quantizer.name):
                quantizer.mode = Mode.OFF
                changed.append(quantizer)
        try:
            yield
        finally:
            for quantizer in changed:
                quantizer.mode = Mode.QUANTIZE

    def walk(
        self,
        batches: Iterable[Any] | None,
        store: Store,
        *,
        is_quantized: bool,
        keeps_unquantized: bool,
        folds_only: AbstractSet[str] = frozenset(),
    ) -> Walk:
        """See ``Door.walk``."""
        return Walk(
            self.model,
            self._call,
            self._calls(batches or ()),
            store,
            is_quantized=is_quantized,
            keeps_full=keeps_unquantized,
            fused=self._plan.fused_weights() if self._plan is not None else (),
            experts=self._experts,
            folds_only=folds_only,
            turned=self._rotations.turned,
        )

    def _calls(self, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        """Batches, and in place of a function of the model the calls that it makes."""
        for batch in batches:
            if callable(batch) and not isinstance(batch, torch.Tensor):
                recorded: list[Any] = []
                hook = self.model.register_forward_pre_hook(
                    lambda module, args, kwargs, recorded=recorded: recorded.append((args, kwargs)), with_kwargs=True
                )
                try:
                    self.run(batch)
                finally:
                    hook.remove()
                yield from (("call", call) for call in recorded)
            else:
                yield "batch", batch

    def _call(self, kept: tuple[str, Any]) -> Any:
        kind, content = kept
        if kind == "batch":
            return feed(self.model, content)
        args, kwargs = content
        return self.model(*args, **kwargs)

    def snapshot(self) -> TorchSnapshot:
        """See ``Door.snapshot``."""
        uncalibrated = [
            q.name for q in surgery.quantizers(self.model) if not q.is_calibrated and q.mode is Mode.QUANTIZE
        ]
        if uncalibrated:
            raise UserError(f"quantizer '{uncalibrated[0]}' has no range yet: calibrate first")
        return TorchSnapshot(self.model)

    def restore(self, plan: Plan, tensors: Mapping[str, torch.Tensor], layers: Iterable[LayerSnapshot]) -> None:
        """See ``Door.restore``."""
        load_tensors(self.model, dict(tensors))
        self._prepare(plan, is_folded=True)
        restore_layers(self.model, layers)

    def simulated_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Door.simulated_weights``."""
        return simulated_weights(self.model)

    def activation_scales(self) -> dict[str, float]:
        """See ``Door.activation_scales``."""
        return activation_scales(self.model)

    def simulated_extras(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ``Door.simulated_extras``."""
        return simulated_extras(self.model)

    @torch.no_grad()
    def twin(
        self,
        weights: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        scales: Mapping[str, torch.Tensor],
        extras: Mapping[str, torch.Tensor],
    ) -> TorchDoor:
        """See ``Door.twin``."""
        model = copy.deepcopy(self.model)
        slots = model.state_dict(keep_vars=True)
        for key, value in (*weights.items(), *tensors.items()):
            slots[key].copy_(value)
        replace_scales(model, scales)
        replace_extras(model, extras)
        return TorchDoor(model, self.source)

    def write_skeleton(self, directory: Path) -> None:
        """See ``Door.write_skeleton``: a torch model is built from its configuration or its class.

        The shapes of the sample are kept, so that it can be traced again.
        """
        shapes = shapes_of(self._sample)
        if self._sample is not None and shapes is not None:
            (directory / SAMPLE_FILE).write_text(json.dumps(shapes, indent=1) + "\n", encoding="utf-8")

    def strip(self) -> None:
        """See ``Door.strip``."""
        surgery.strip(self.model)
        self._known = self._plan = self._experts = None


def weight_quantizers(model: nn.Module) -> Iterator[tuple[WeightQuantizer, nn.Parameter]]:
    """Every weight quantizer with its parameter, tied ones once."""
    for child in model.modules():  # which gives a module that is shared once
        if isinstance(child, WeightQuantizer):
            yield child, stored_parameter(model, child.key)


@torch.no_grad()
def simulated_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """State-dict key of every quantized weight, and the rounded values that the simulation computes with."""
    names: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    for quantizer, parameter in weight_quantizers(model):
        if quantizer.mode is Mode.QUANTIZE:
            rounded = quantizer(parameter)
            yield from ((key, rounded) for key in names[id(parameter)])


def activation_scales(model: nn.Module) -> dict[str, float]:
    """Full quantizer name -> scale, of every static activation quantizer that is on."""
    return {
        q.name: float(q.scale)
        for q in surgery.quantizers(model)
        if isinstance(q, ActivationQuantizer) and q.scale is not None and q.mode is Mode.QUANTIZE
    }
