"""The ONNX door: one graph seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from octavo.backends.saturation import is_simulated
from octavo.errors import UserError
from octavo.numerics.arrays import array_of
from octavo.numerics.door import RotationFacts, Walk
from octavo.numerics.observers import Observer
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import LayerSnapshot
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.onnx.beside import extras_of, tensors_of
from octavo.onnx.calibration import Calibration, observers_of, update
from octavo.onnx.graph import GraphSite, facts_of, find_sites, macs_of, measured
from octavo.onnx.marked import Found, Range, marked, quantizers_of, rounded, simulated
from octavo.onnx.opening import open_graph
from octavo.onnx.saturation import SaturatingGraph
from octavo.onnx.segments import Segments
from octavo.onnx.sessions import session_of
from octavo.onnx.skeleton import filled, write_skeleton
from octavo.onnx.snapshot import GraphSnapshot
from octavo.onnx.storage import not_simulated
from octavo.onnx.walk import GraphWalk
from octavo.sources.feeding import feed
from octavo.sources.graphs import GRAPH_FILE, Arrays, GraphModule
from octavo.spec.facts import ModelFacts, Slot
from octavo.spec.plan import Plan, QuantizerSpec
from octavo.spec.select import quantizer_name
from octavo.spec.targets import target_named


class OnnxDoor:
    """``numerics.door.Door`` for a graph in a file; the file is only read.

    Args:
        module: The graph.
        source: What the user called it.
        sample: One batch, for the shapes that multiply-adds follow from; ``None``: they stay unknown.
    """

    def __init__(self, module: GraphModule, source: str = "", sample: Any = None) -> None:
        self.module = module
        self.source = source or module.path.name
        self._sample = sample
        self._known: tuple[ir.Model, ModelFacts, dict[str, GraphSite]] | None = None
        self._plan: Plan | None = None
        self._found = Found({}, {})
        self._disabled: frozenset[str] = frozenset()
        self._sessions: dict[tuple[frozenset[str], bool], Callable[[Arrays], Arrays]] = {}
        self._observers: dict[str, Observer] = {}
        self._segments: Segments | None = None  # what measured the sample serves calibration, too

    def _look(self) -> tuple[ir.Model, ModelFacts, dict[str, GraphSite]]:
        if self._known is None:
            model = open_graph(self.module.path)
            sites = find_sites(model)
            shapes = {} if self._sample is None else self._shapes(model, sites)
            sites = [_with_macs(site, macs_of(site, shapes)) for site in sites] if shapes else sites
            self._know(model, sites, was_traced=self._sample is not None)
        assert self._known is not None
        return self._known

    def _know(self, model: ir.Model, sites: Sequence[GraphSite] = (), *, was_traced: bool = False) -> None:
        sites = sites or find_sites(model)
        facts = facts_of(model, sites, self.source, was_traced=was_traced)
        self._known = model, facts, {site.facts.name: site for site in sites}

    def _shapes(self, model: ir.Model, sites: Sequence[GraphSite]) -> dict[str, tuple[int, ...]]:
        """Shapes that multiply-adds follow from, from one forward pass on the sample."""
        shapes: dict[str, tuple[int, ...]] = {}
        self._segments = segments = Segments(model, {str(o.value.name) for site in sites for o in measured(site)})

        def run(arrays: Arrays) -> Arrays:
            return segments.run(dict(arrays), lambda name, value: shapes.update({name: value.shape}))

        self.module.simulate(run)
        try:
            self.run(self._sample)
        finally:
            self.module.simulate(None)
        return shapes

    def facts(self) -> ModelFacts:
        """See ``Door.facts``."""
        return self._look()[1]

    def find_rotations(self, kinds: frozenset[str], *, may_untie: bool) -> RotationFacts:
        """See ``Door.find_rotations``: a graph gets none."""
        return RotationFacts(tuple(f"rotate: {kind}: weights of a graph are not rotated" for kind in sorted(kinds)))

    def why_not(self, needs: frozenset[Need]) -> str:
        """See ``Door.why_not``: onnxruntime has no gradients."""
        if Need.GRADIENTS not in needs:
            return ""
        return (
            "it learns by gradients, which a graph does not give: take the step out (gptq needs none), or quantize the "
            "torch model and write it with --layout onnx"
        )

    def tie_again(self) -> None:
        """See ``Door.tie_again``: nothing was untied."""

    def rotate(self, block: int | str) -> tuple[str, ...]:
        """See ``Door.rotate``: nothing was found."""
        return ()

    def prepare(self, plan: Plan) -> None:
        """See ``Door.prepare``."""
        if self._plan is not None:
            raise UserError("this graph has octavo's quantizers already: take them out first with octavo.strip(model)")
        if problem := not_simulated(plan):
            raise UserError(problem)
        self._look()
        self._plan = plan
        self._observers = observers_of(plan, self._look()[2])
        self._found = Found({}, {}, [name for name, _ in plan.quantizers()])
        self.module.marked = self._marked
        self.module.simulate(self._simulate)

    @torch.no_grad()
    def run(self, batch: Any) -> Any:
        """See ``Door.run``."""
        return feed(self.module, batch)

    def evaluating(self) -> AbstractContextManager[None]:
        """See ``Door.evaluating``: a graph knows no other."""
        return nullcontext()

    def walk(
        self,
        batches: Iterable[Any] | None,
        store: Store,
        *,
        is_quantized: bool,
        keeps_unquantized: bool,
        folds_only: AbstractSet[str] = frozenset(),
    ) -> Walk:
        """See ``Door.walk``: consecutive pieces of the graph, whose weights change in memory and not in the file."""
        assert self._plan is not None
        model, _, sites = self._look()
        self._segments = None
        arrays = [self.module.arrays_of(batch) for batch in batches or ()]
        calibration = Calibration(model, self._plan, sites, self._settle)
        return GraphWalk(
            calibration,
            arrays,
            store,
            is_quantized=is_quantized,
            keeps=keeps_unquantized,
            folds_only=folds_only,
        )

    @contextmanager
    def observe(self) -> Iterator[None]:
        """See ``Door.observe``: the graph runs in pieces, and each tensor is looked at and dropped."""
        tensors: dict[str, dict[int, tuple[str, Observer]]] = {}
        for name, _, site, slot in self._quantizers():
            if name in self._observers:
                observer = self._observers[name]
                tensors.setdefault(str(site.operands[slot].value.name), {})[id(observer)] = (name, observer)
        segments, self._segments = self._segments, None
        if segments is None or not segments.observed.issuperset(tensors):
            segments = Segments(self._look()[0], tensors)

        def look(tensor: str, value: np.ndarray[Any, Any]) -> None:
            for name, observer in tensors.get(tensor, {}).values():
                update(name, observer, value)

        self.module.simulate(lambda arrays: segments.run(dict(arrays), look))
        try:
            yield
        finally:
            self.module.simulate(self._simulate)

    def finish_calibration(self) -> Mapping[str, str]:
        """See ``Door.finish_calibration``. Weights are looked at here, once."""
        assert self._plan is not None
        model, _, sites = self._look()
        return Calibration(model, self._plan, sites, self._settle, observers=self._observers).settle(sites)

    def _settle(self, found: Found) -> None:
        self._found = found
        self._sessions.clear()
        self._observers, self._segments = {}, None

    def expert_tokens(self) -> Mapping[str, Sequence[int]]:
        """See ``Door.expert_tokens``: a graph does not say which products are experts."""
        return {}

    def quantizer_names(self) -> Sequence[str]:
        """See ``Door.quantizer_names``; those that stay off are not among them."""
        return [name for name, _, _, _ in self._quantizers() if name not in self._found.off]

    @contextmanager
    def disabled(self, names: Callable[[str], bool]) -> Iterator[None]:
        """See ``Door.disabled``."""
        before = self._disabled
        self._disabled = before | {name for name in self.quantizer_names() if names(name)}
        try:
            yield
        finally:
            self._disabled = before

    def _simulate(self, arrays: Arrays) -> Arrays:
        return self._simulation()(arrays)

    def _simulation(self) -> Callable[[Arrays], Arrays]:
        """The graph with the quantizers that are on; the last two are kept."""
        off = frozenset(self._found.off) | self._disabled
        key = off, is_simulated()
        if key not in self._sessions:
            assert self._plan is not None
            model, _, sites = self._look()
            known = Found(self._found.ranges, self._found.weights, off)
            while len(self._sessions) > 1:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[key] = self._runner(simulated(model, self._plan, sites, known), off)
        return self._sessions[key]

    def _runner(self, model: ir.Model, off: frozenset[str]) -> Callable[[Arrays], Arrays]:
        found = self._saturating(off) if is_simulated() else {}
        if found:
            codes = {name: weight for name, weight in self._found.weights.items() if isinstance(weight, QTensor)}
            return SaturatingGraph(model, found, codes).run
        session = session_of(model)
        outputs = [value.name for value in session.get_outputs()]
        return lambda arrays: dict(zip(outputs, session.run(None, dict(arrays)), strict=True))

    def _saturating(self, off: frozenset[str]) -> dict[str, GraphSite]:
        """Sites whose sums saturate on the target, with both their quantizers on."""
        assert self._plan is not None
        target, sites = target_named(self._plan.target), self._look()[2]
        return {
            name: sites[name]
            for name, scheme in ((d.site.name, d.scheme) for d in self._plan.decisions)
            if target.saturates_at(sites[name].facts, scheme)
            and not off & {quantizer_name(name, slot) for slot in (Slot.WEIGHT, Slot.INPUT)}
        }

    def _quantizers(self) -> list[tuple[str, QuantizerSpec, GraphSite, Slot]]:
        return [] if self._plan is None else quantizers_of(self._plan, self._look()[2])

    def _marked(self) -> ir.Model:
        """The graph with a node for every quantizer, for who writes it."""
        assert self._plan is not None
        model, _, sites = self._look()
        return marked(model, self._plan, sites, self._found)

    def snapshot(self) -> GraphSnapshot:
        """See ``Door.snapshot``."""
        assert self._plan is not None
        model, _, sites = self._look()
        return GraphSnapshot(model, self._plan, sites, self._found)

    def restore(self, plan: Plan, tensors: Mapping[str, Tensor], layers: Iterable[LayerSnapshot]) -> None:
        """See ``Door.restore``."""
        layers = list(layers)
        model = filled(self.module.path, {**tensors, **tensors_of(layers)})
        self.module.reopen(lambda: session_of(model))
        self._know(model)
        lost = sorted({decision.site.name for decision in plan.decisions} - self._look()[2].keys())
        if lost:
            raise UserError(
                f"{self.module.path.parent}: its graph has no '{lost[0]}', which its plan names: the run is damaged, "
                "or another version of octavo wrote it; quantize the model again"
            )
        ranges: dict[str, Range] = {}
        weights: dict[str, QTensor | Tensor] = {}
        for layer in layers:
            if layer.weight is not None:
                weights[layer.name] = layer.weight
            for slot, activation in layer.activations.items():
                if isinstance(activation.scale, Tensor):
                    ranges[quantizer_name(layer.name, slot)] = activation.scale, activation.zero_point
        self.prepare(plan)
        on = {*ranges, *(quantizer_name(name, Slot.WEIGHT) for name in weights)}
        off = [
            n
            for n, spec, _, slot in self._quantizers()
            if n not in on and not (spec.is_dynamic and slot is not Slot.WEIGHT)
        ]
        self._settle(Found(ranges, weights, off))

    def simulated_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Door.simulated_weights``."""
        for name, _, site, slot in self._quantizers():
            if slot is Slot.WEIGHT and name not in self._found.off:
                yield site.facts.weight_name, rounded(site, self._found.weights[site.facts.name])

    def activation_scales(self) -> Mapping[str, float]:
        """See ``Door.activation_scales``."""
        return {name: float(scale) for name, (scale, _) in self._found.ranges.items()}

    def simulated_extras(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Door.simulated_extras``."""
        for layer in self.snapshot().layers():
            yield from extras_of(layer)

    def twin(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
    ) -> OnnxDoor:
        """See ``Door.twin``."""
        assert self._plan is not None
        model = self._look()[0].clone()
        here = {name: value for name, value in extras.items() if name in model.graph.initializers and value.ndim}
        here |= {name: value.T for name, value in here.items() if ".low_rank." in name}
        for name, value in {**tensors, **here}.items():
            model.graph.initializers[name].const_value = ir.Tensor(array_of(value), name=name)
        twin = OnnxDoor(GraphModule(self.module.path), self.source)
        twin.module.reopen(lambda: session_of(model))
        twin._know(model)
        twin.prepare(self._plan)
        ranges = {name: (scales.get(name, scale), zero) for name, (scale, zero) in self._found.ranges.items()}
        by_site = {
            s.facts.name: weights[s.facts.weight_name] for _, _, s, slot in self._quantizers() if slot is Slot.WEIGHT
        }
        twin._settle(Found(ranges, by_site, self._found.off))
        return twin

    def write_skeleton(self, directory: Path) -> None:
        """See ``Door.write_skeleton``: the graph without its weights."""
        write_skeleton(self._look()[0], directory / GRAPH_FILE)

    def strip(self) -> None:
        """See ``Door.strip``."""
        self.module.simulate(None)
        self.module.marked = None
        self._plan, self._found, self._disabled = None, Found({}, {}), frozenset()
        if self.module.path.name != GRAPH_FILE:  # a run's graph has its weights only here
            self._known = None  # steps may have changed weights
        self._sessions.clear()


def _with_macs(site: GraphSite, macs: int | None) -> GraphSite:
    return replace(site, facts=replace(site.facts, macs=macs))
