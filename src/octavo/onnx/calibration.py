"""What calibration finds of a graph: observers and what becomes of them, and weights while steps change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from octavo.backends.codes import quantize
from octavo.backends.weight_ranges import weight_range
from octavo.numerics.arrays import array_of, tensor_of
from octavo.numerics.block_state import BlockState, from_parts, named_parts
from octavo.numerics.observers import NotFiniteError, Observer, make_observer
from octavo.numerics.qtensor import QTensor
from octavo.numerics.scaling import scale_from_range
from octavo.onnx.beside import add_branch, branch_of, rotate_input
from octavo.onnx.graph import GraphSite
from octavo.onnx.marked import Found, Range, quantizers_of, simulated
from octavo.onnx.pre_scales import divide_input, pre_scale_of
from octavo.spec.facts import Slot
from octavo.spec.plan import Plan, QuantizerSpec
from octavo.spec.select import quantizer_name

Sites = Mapping[str, GraphSite]
_RANGE = ("scale", "zero_point")


class Calibration:
    """A graph while blocks are calibrated one after the other.

    Args:
        model: The graph; its initializers change where steps write.
        plan: What it was prepared with.
        sites: Site name -> site.
        publish: Told what is found whenever a block is settled.
        observers: Those that have looked already; new ones unless given.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: Plan,
        sites: Sites,
        publish: Callable[[Found], None],
        *,
        observers: Mapping[str, Observer] | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.weights: dict[str, QTensor | Tensor] = {}
        self._written: set[str] = set()
        self._plan = plan
        self._publish = publish
        self._specs = {decision.site.name: decision.scheme for decision in plan.decisions}
        self._quantizers = quantizers_of(plan, sites)
        self._observers = observers_of(plan, sites) if observers is None else dict(observers)
        self._ranges: dict[str, Range] = {}
        self._off = {name for name, _, _, _ in self._quantizers}
        self._divided: dict[str, list[str]] = {}  # initializer -> layers, since the last state
        self._rotated: dict[str, list[Any]] = {}  # first layer -> all of them, and the size of blocks
        self._branched: list[str] = []

    def spec(self, layer: str, slot: Slot) -> QuantizerSpec | None:
        """What the plan gives a slot."""
        return self._specs.get(layer, {}).get(slot)

    def weight_spec(self, layer: str) -> QuantizerSpec | None:
        """What the plan gives a weight."""
        return self.spec(layer, Slot.WEIGHT)

    def read_weight(self, layer: str) -> Tensor:
        """``(out_features, in_features)``, as it is now."""
        return matrix_of(self.sites[layer], self.model)

    def rounded(self, layer: str) -> QTensor:
        """A weight's codes as ``settle`` would find them."""
        joined = next((names for names in self._plan.fused_weights() if layer in names), (layer,))
        return self._codes(layer, joined, self._shared_amaxes(set(joined)))

    def write_weight(self, layer: str, value: Tensor) -> None:
        """Replace a weight by a matrix."""
        view = self.sites[layer].view
        assert view is not None
        self.write(self.sites[layer].facts.weight_name, view.to_parameter(value))

    def write(self, name: str, value: Tensor) -> None:
        """Replace an initializer; its type stays."""
        initializer = self.model.graph.initializers[name]
        assert initializer.const_value is not None
        array = np.ascontiguousarray(array_of(value)).astype(initializer.const_value.numpy().dtype)
        initializer.const_value = ir.Tensor(array, name=name)
        self._written.add(name)

    @contextmanager
    def computing_with_fixed(self, layers: Iterable[str]) -> Iterator[None]:
        """While open, the graph has the fixed weights of ``layers`` in place of the unrounded ones."""
        initializers = self.model.graph.initializers
        names = [self.sites[layer].facts.weight_name for layer in layers]
        before = {name: initializers[name].const_value for name in names}
        written = set(self._written)
        try:
            for layer in layers:
                self.write_weight(layer, self.weights[layer].dequantize())
            yield
        finally:
            self._written = written
            for name, value in before.items():
                initializers[name].const_value = value

    def divide(self, layers: Sequence[str], scale: Tensor) -> ir.Node | None:
        """Divide what ``layers`` read by a scale, in front of them.

        Returns:
            The node that is new; ``None`` where one was there.
        """
        sites = [self.sites[layer] for layer in layers]
        known = pre_scale_of(sites[0])
        if known is not None and known.const_value is not None:
            self.write(str(known.name), tensor_of(known.const_value.numpy()) * scale)
            return None
        node = divide_input(self.model.graph, sites, scale)
        self._divided[str(node.inputs[1].name)] = list(layers)  # type: ignore[union-attr]
        self._written.add(str(node.inputs[1].name))  # type: ignore[union-attr]
        return node

    def rotate(self, layers: Sequence[str], block_size: int) -> list[ir.Node]:
        """Rotate what ``layers`` read, in front of them; the nodes that are new."""
        self._rotated[layers[0]] = [list(layers), block_size]
        return rotate_input(self.model.graph, [self.sites[layer] for layer in layers], block_size)

    def branch(self, layer: str, a: Tensor, b: Tensor) -> list[ir.Node]:
        """Put a low-rank branch beside ``layer``; the nodes that are new."""
        nodes = add_branch(self.model.graph, self.sites[layer], a, b)
        self._branched.append(layer)
        self._written.update(str(value.name) for value in branch_of(self.sites[layer]) or ())
        return nodes

    def observed_in(self, sites: Iterable[str]) -> list[str]:
        """Tensors that quantizers of these sites look at."""
        return [str(site.operands[slot].value.name) for _, site, slot in self._static(sites)]

    def look(self, sites: Iterable[str], found: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Let their observers look; one that is shared looks once."""
        seen: set[int] = set()
        for name, site, slot in self._static(sites):
            observer = self._observers[name]
            if id(observer) not in seen:
                seen.add(id(observer))
                update(name, observer, found[str(site.operands[slot].value.name)])

    def forget(self, sites: Iterable[str]) -> None:
        """New observers for quantizers of these sites: what they saw has changed."""
        fresh = observers_of(self._plan, self.sites)
        self._observers |= {name: fresh[name] for name, _, _ in self._static(sites)}

    def settle(self, sites: Iterable[str]) -> dict[str, str]:
        """Ranges and codes of these sites.

        Returns:
            Quantizer name -> why it stays off.
        """
        off: dict[str, str] = {}
        inside = set(sites)
        shared, joined = self._shared_amaxes(inside), self._plan.fused_weights()
        for name, spec, site, slot in self._quantizers:
            if site.facts.name not in inside:
                continue
            if slot is Slot.WEIGHT:
                own = site.facts.name
                if own not in self.weights:
                    group = next((names for names in joined if own in names), ())
                    self.weights[own] = self._codes(own, group, shared)
            elif name in self._observers:
                found = range_of(self._observers[name], spec)
                if isinstance(found, str):
                    off[name] = found
                    continue
                self._ranges[name] = found
            self._off.discard(name)
        self._tell()
        return off

    def _codes(self, layer: str, joined: Iterable[str], shared: Mapping[str, Tensor]) -> QTensor:
        """A weight's codes; ``joined`` are the layers that engines compute as one with it."""
        spec = self.weight_spec(layer)
        assert spec is not None
        known = () if layer in shared else (outer_of(self.weights.get(other)) for other in joined)
        outer = next((outer for outer in known if outer is not None), None)
        name, matrix = quantizer_name(layer, Slot.WEIGHT), self.read_weight(layer)
        return codes_of(name, spec, matrix, shared_amax=shared.get(layer), outer=outer)

    def _shared_amaxes(self, inside: AbstractSet[str]) -> dict[str, Tensor]:
        """Site -> the largest magnitude of all weights that share the scale of their scales with its own.

        Engines compute such layers as one. Where an algorithm fixed one of them, the others take its scale instead.
        """
        found: dict[str, Tensor] = {}
        for group in self._plan.fused_weights():
            names = inside & set(group)
            if len(names) > 1 and not self.weights.keys() & names:
                largest = torch.stack([self.read_weight(name).abs().amax() for name in names]).amax()
                found |= dict.fromkeys(names, largest)
        return found

    def _tell(self) -> None:
        self._publish(Found(dict(self._ranges), dict(self.weights), tuple(self._off)))

    def state(self, sites: Iterable[str]) -> BlockState:
        """What was found for these sites, and everything that was written since the last call."""
        tensors = {}
        names = [name for name, _, site, _ in self._quantizers if site.facts.name in set(sites)]
        for name, part in (
            (n, p) for n in names if n in self._ranges for p in zip(_RANGE, self._ranges[n], strict=True)
        ):
            if part[1] is not None:
                tensors[f"{name}.{part[0]}"] = part[1]
        for site in sites:
            weight = self.weights.get(site)
            if isinstance(weight, QTensor):
                tensors |= dict(named_parts(f"codes.{site}", weight))
        for name in self._written:
            value = self.model.graph.initializers[name].const_value
            assert value is not None
            tensors[f"model.{name}"] = tensor_of(value.numpy())
        self._written.clear()
        facts = {
            "on": [name for name in names if name not in self._off],
            "divided": dict(self._divided),
            "rotated": dict(self._rotated),
            "branched": list(self._branched),
        }
        self._forget_additions()
        return BlockState(tensors, facts)

    def _forget_additions(self) -> None:
        self._divided.clear()
        self._rotated.clear()
        self._branched.clear()

    def bring_back(self, sites: Iterable[str], state: BlockState) -> list[ir.Node]:
        """Find what ``state`` was found to be.

        Returns:
            Nodes that are new.
        """
        divided = state.facts["divided"].items()
        nodes = [self.divide(layers, state.tensors[f"model.{name}"]) for name, layers in divided]
        for layers, block_size in state.facts["rotated"].values():
            nodes += self.rotate(layers, block_size)
        for layer in state.facts["branched"]:
            factors = (state.tensors[f"model.{layer}.low_rank.{part}"] for part in "ab")
            nodes += self.branch(layer, *(factor.T for factor in factors))
        self._forget_additions()
        for key, tensor in state.tensors.items():
            if key.startswith("model."):
                self.write(key.removeprefix("model."), tensor)
        self._written.clear()
        for name, spec, site, slot in self._quantizers:
            if site.facts.name not in set(sites):
                continue
            if slot is Slot.WEIGHT:
                shape = tuple(matrix_of(site, self.model).shape)
                self.weights[site.facts.name] = from_parts(
                    f"codes.{site.facts.name}", spec.format, shape, state.tensors
                )
            elif f"{name}.scale" in state.tensors:
                scale, zero_point = (state.tensors.get(f"{name}.{part}") for part in _RANGE)
                assert scale is not None
                self._ranges[name] = scale, zero_point
        self._off -= set(state.facts["on"])
        self._tell()
        return [node for node in nodes if node is not None]

    def simulated(self, sites: Iterable[str]) -> ir.Model:
        """The graph with the quantizers of these sites, which are settled."""
        own = {quantizer_name(name, slot) for name in sites for slot in self._specs.get(name, {})}
        off = {name for name, _, _, _ in self._quantizers if name not in own or name in self._off}
        return simulated(self.model, self._plan, self.sites, Found(self._ranges, self.weights, off))

    def _static(self, sites: Iterable[str]) -> list[tuple[str, GraphSite, Slot]]:
        inside = set(sites)
        return [
            (name, site, slot)
            for name, _, site, slot in self._quantizers
            if name in self._observers and site.facts.name in inside
        ]


def matrix_of(site: GraphSite, model: ir.Model) -> Tensor:
    """A weight as ``(out_features, in_features)``, fp32."""
    assert site.view is not None
    data = model.graph.initializers[site.facts.weight_name].const_value
    assert data is not None
    return site.view.to_matrix(tensor_of(data.numpy())).float().contiguous()


def observers_of(plan: Plan, sites: Mapping[str, GraphSite]) -> dict[str, Observer]:
    """Quantizer -> observer; one for all that read the same tensor in the same format."""
    shared: dict[tuple[str, QuantizerSpec], Observer] = {}
    observers = {}
    for name, spec, site, slot in quantizers_of(plan, sites):
        if slot is not Slot.WEIGHT and not spec.is_dynamic:
            key = (str(site.operands[slot].value.name), spec)
            if key not in shared:
                shared[key] = make_observer(spec.observer, spec.format)
            observers[name] = shared[key]
    return observers


def update(name: str, observer: Observer, value: np.ndarray[Any, Any]) -> None:
    """Let an observer look; what it refuses is said with the quantizer's name."""
    if not value.size:
        return
    try:
        observer.update(tensor_of(value).float())
    except NotFiniteError as error:
        raise NotFiniteError(f"quantizer '{name}': {error}") from error


def range_of(observer: Observer, spec: QuantizerSpec) -> Range | str:
    """Scale and zero point, or why there is none."""
    if observer.count == 0:
        return "saw no calibration data"
    low, high = observer.range()
    if float(low) == 0.0 and float(high) == 0.0:
        return "every value in the calibration data was 0"
    return scale_from_range(low, high, spec.format)


@torch.no_grad()
def codes_of(
    name: str,
    spec: QuantizerSpec,
    matrix: Tensor,
    *,
    shared_amax: Tensor | None = None,
    outer: Tensor | None = None,
) -> QTensor:
    """A weight's codes, its range found as the plan says; ``shared_amax`` and ``outer`` as for ``weight_range``."""
    if not bool(torch.isfinite(matrix).all()):
        raise NotFiniteError(f"quantizer '{name}': the weight holds NaN or inf; the file is damaged")
    if spec.format.is_plain:
        return quantize(matrix, spec.format)
    scale, points = weight_range(matrix, spec, shared_amax=shared_amax, outer=outer)
    return quantize(matrix, spec.format, scale=scale, zero_point=points)


def outer_of(weight: QTensor | Tensor | None) -> Tensor | None:
    """The scale of a weight's scales, in a format that has one per tensor."""
    scales = weight.scale if isinstance(weight, QTensor) else None
    return scales.scale if isinstance(scales, QTensor) and isinstance(scales.scale, Tensor) else None
