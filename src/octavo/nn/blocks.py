"""Blocks of a torch model as algorithms see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.block_layers import BlockLayer, block_layers
from octavo.nn.block_state import bring_back, state_of, versions
from octavo.nn.calls import KeptTree, Tree, floating
from octavo.nn.choices import Choices
from octavo.nn.ears import Ears, Enough
from octavo.nn.experts import ExpertWatch
from octavo.nn.extras import InputTransform
from octavo.nn.flow import Link, Producer, divide_columns
from octavo.nn.fusion import Member, fixed_outers, shared_amaxes
from octavo.nn.groups import Grouping, in_order
from octavo.nn.joints import Joint
from octavo.nn.links import Known, Links
from octavo.nn.posts import Posts
from octavo.nn.quantizer import ActivationQuantizer, Mode, Quantizer, new_observer
from octavo.nn.stacks import Stack, StackedMatrix, takes_apart
from octavo.numerics.block_state import BlockState
from octavo.numerics.door import Fold, InputGroup, site_of
from octavo.numerics.hadamard import rotate
from octavo.numerics.observers import AbsMaxObserver
from octavo.numerics.qtensor import QTensor
from octavo.numerics.statistics import InputStatistics, Need
from octavo.numerics.store import Store
from octavo.numerics.tensor_error import relative_error
from octavo.spec.plan import QuantizerSpec


class Feed(Protocol):
    """How a block gets its inputs, runs, and hands on what it made."""

    num_batches: int
    has_successor: bool

    def tokens(self, index: int) -> Tensor | None:
        """``(batch, length)``: which positions of one batch hold no padding; ``None`` where all do, or nobody knows."""
        ...

    def run(self, index: int, *, full: bool = False) -> Tree:
        """The forward on one batch; ``full``: on the inputs of the unquantized path."""
        ...

    def keep(self, index: int, output: Tree, *, full: bool = False) -> None:
        """Hand an output on to what comes next."""
        ...

    def release(self) -> None:
        """The inputs are not needed any more."""
        ...

    def run_sample(self) -> Tree:
        """The forward on a few samples."""
        ...


class TorchBlock:
    """``numerics.door.Block`` for a part of a torch model.

    Args:
        name: Path of the module, or what a segment between blocks is called.
        model: The whole model.
        root: The module that the block is, or the model.
        quantizers: Those that belong to the block.
        feed: See there.
        store: Where outputs wait.
        is_quantized: What comes next gets simulated outputs.
        keeps_full: The unquantized path is followed, too.
        fused: Names of layers that engines join, group by group.
        experts: Counts the tokens of experts.
        known_links: Links of blocks that are built alike, which are not looked for again.
        folds_only: Layers whose input takes a scale only where it can be folded.
        turned: Keys of weights whose inputs a rotation of weights has turned.
        known_joints: Joints of blocks that are built alike.
    """

    def __init__(
        self,
        name: str,
        *,
        model: nn.Module,
        root: nn.Module,
        quantizers: Sequence[Quantizer],
        feed: Feed,
        store: Store,
        is_quantized: bool,
        keeps_full: bool,
        fused: Sequence[Sequence[str]] = (),
        experts: ExpertWatch | None = None,
        known_links: Known | None = None,
        folds_only: AbstractSet[str] = frozenset(),
        turned: frozenset[str] = frozenset(),
        known_joints: dict[object, tuple[Joint, ...]] | None = None,
    ) -> None:
        self._turned = turned
        self.name = name
        self._known_links = {} if known_links is None else known_links
        self._known_joints = {} if known_joints is None else known_joints
        self._scale_groups: list[InputGroup] | None = None
        self._joints: dict[tuple[str, ...], Joint] = {}
        self._choices = Choices()
        self._changes: dict[str, list[Callable[[InputStatistics], InputStatistics]]] = {}
        self._experts = experts
        self._fused = fused
        self.feed = feed
        self._root = root
        self._prefix = "" if root is model else f"{name}."
        self._quantizers = list(quantizers)
        self._layers = block_layers(model, self._quantizers)
        self._stacks = {name: Stack(layer) for name, layer in self._layers.items() if takes_apart(layer)}
        self._parts = _taken_apart(self._layers, self._stacks)
        self._posts = Posts(root, self._stacks.keys())
        self._grouping = Grouping(root, self._prefix, self._layers, self._stacks.keys(), folds_only)
        self._store = store
        self._is_quantized = is_quantized
        self._keeps_full = keeps_full
        self._leader: dict[str, str] = {}
        self._channels: dict[str, int] = {}
        self._statistics: dict[str, InputStatistics] = {}
        self._links: dict[str, Link | None] = {}
        self._groups: list[InputGroup] | None = None
        self._targets: list[KeptTree] = []
        self._reference: list[Tensor] | None = None
        self._has_folded = False
        self._needs: frozenset[Need] = frozenset()
        self._unrounded: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._means: dict[str, Tensor] = {}
        self._folds_only = folds_only
        self._model = model
        self._before = versions(model)

    # What an algorithm reads

    def layers(self) -> Sequence[str]:
        """See ``Block.layers``."""
        return [*self._leader, *(name for name in self._parts if name not in self._leader)]

    def read_weight(self, layer: str) -> Tensor:
        """See ``Block.read_weight``."""
        return self._parts[layer].matrix

    def read_bias(self, layer: str) -> Tensor | None:
        """See ``Block.read_bias``."""
        bias = self._parts[layer].bias
        return None if bias is None else bias.detach()

    def takes_bias(self, layer: str) -> bool:
        """See ``Block.takes_bias``."""
        return self._parts[layer].takes_bias

    def add_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.add_bias``."""
        self._layers[layer].add_bias(value)

    def weight_spec(self, layer: str) -> QuantizerSpec:
        """See ``Block.weight_spec``."""
        return self._parts[layer].spec

    def input_spec(self, layer: str) -> QuantizerSpec | None:
        """See ``Block.input_spec``."""
        quantizer = self._parts[layer].input_quantizer
        return None if quantizer is None else quantizer.spec

    def takes_low_rank(self, layer: str) -> bool:
        """See ``Block.takes_low_rank``."""
        return self._parts[layer].takes_low_rank

    def statistics(self, layer: str) -> InputStatistics:
        """See ``Block.statistics``."""
        known = self._statistics.get(self._leader.get(layer, layer))
        if known is not None and known.count:
            return known
        stack = self._stacks.get(site_of(layer))
        if stack is None or not any(matrix.name in self._leader for matrix in stack.matrices):
            return InputStatistics(0)
        white = InputStatistics.white(self._parts[layer].matrix.shape[-1], stack.layer.parameter.device)
        return reduce(lambda known, change: change(known), self._changes.get(layer, []), white)

    def is_turned(self, layer: str) -> bool:
        """See ``Block.is_turned``."""
        return self._layers[site_of(layer)].quantizer.key in self._turned

    def groups(self) -> Sequence[InputGroup]:
        """See ``Block.groups``."""
        if self._groups is None:
            by_leader: dict[str, list[str]] = {}
            for name in self.layers():
                by_leader.setdefault(self._leader.get(name, name), []).append(name)
            self._links = self._found_links(by_leader) if self._leader and self.feed.num_batches else {}
            self._groups = [self._group(leader, tuple(names)) for leader, names in by_leader.items()]
        return self._groups

    def _found_links(self, by_leader: Mapping[str, Sequence[str]]) -> dict[str, Link | None]:
        scalable = {name: names for name, names in by_leader.items() if all(self._parts[x].takes_scale for x in names)}
        finder = Links(self._root, self._prefix, self._layers, self._posts, self._probe, known=self._known_links)
        return finder.find(scalable)

    def scale_groups(self) -> Sequence[InputGroup]:
        """See ``Block.scale_groups``."""
        if self._scale_groups is None:
            found = list(self._grouping.joined(self.layers(), self._found_joints()))
            self._joints = {group.layers: joint for group, joint in found}
            joined = [group for group, _ in found]
            self._scale_groups = in_order(self.layers(), self.placed_groups(), joined)
        return self._scale_groups

    def placed_groups(self) -> Sequence[InputGroup]:
        """See ``Block.placed_groups``."""
        return self._grouping.placed(self.layers(), self.groups())

    def _found_joints(self) -> tuple[Joint, ...]:
        key = self._grouping.likeness()
        if key is None or not self._leader or not self.feed.num_batches:
            return ()
        if key not in self._known_joints:
            with self._modes(lambda q: Mode.OFF):
                self._known_joints[key] = self._grouping.find(self._probe)
        return self._known_joints[key]

    def _group(self, leader: str, names: tuple[str, ...]) -> InputGroup:
        layer = self._layers.get(leader)
        takes_scale = all(self._parts[name].takes_scale for name in names)
        if layer is None or not takes_scale:
            return InputGroup(
                names, self._channels.get(leader, self._parts[leader].matrix.shape[-1]), takes_scale=False
            )
        channels = self._channels.get(leader, layer.quantizer.view.matrix_shape[-1])
        link = self._links.get(leader)
        fold = None if link is None else Fold(self._name_of(link.producer), link.sources)
        takes_scale = fold is not None or not self._folds_only & set(names)
        return InputGroup(names, channels, fold, layer.columns(channels), takes_scale)

    def _name_of(self, producer: Producer) -> str:
        """A producer's site, or its path where it has no quantized weight."""
        sites = (layer.name for layer in self._layers.values() if layer.owner is producer.module)
        return next(sites, f"{self._prefix}{producer.path}")

    # What an algorithm changes

    def write_weight(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_weight``."""
        self._refuse_fixed((layer,), "written to")
        self._parts[layer].write(value)

    @torch.no_grad()
    def write_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_bias``."""
        bias = self._layers[layer].bias
        assert bias is not None, "there is no bias to write to"
        bias.copy_(value)

    @torch.no_grad()
    def fix_weight(self, layer: str, value: QTensor) -> None:
        """See ``Block.fix_weight``."""
        found = self._parts[layer]
        if Need.UNROUNDED in self._needs:
            self._unrounded[layer] = found.matrix.clone()
        found.fix(value)

    @torch.no_grad()
    def rounding_error(self, layer: str) -> Tensor:
        """See ``Block.rounding_error``."""
        part = self._parts[layer]
        if part.is_fixed:
            return part.matrix.float() - self._unrounded[layer].float()
        if isinstance(part, StackedMatrix):
            return part.nearest().dequantize() - part.matrix.float()
        found = self._layers[layer]
        before = found.quantizer.mode
        self._find_ranges([layer])
        rounded = found.quantizer.view.to_matrix(found.quantizer(found.parameter.detach()))
        found.quantizer.mode = before
        return rounded.float() - found.matrix.float()

    def mean_input(self, layer: str) -> Tensor | None:
        """See ``Block.mean_input``."""
        known = self.statistics(layer)
        if known.total is not None and known.count:
            return known.mean
        mean = self._means.get(self._leader.get(layer, layer))
        if mean is None:
            return None
        rows, width = self._layers[layer].quantizer.view.matrix_shape
        groups = mean.view(-1, width)
        return groups.repeat_interleave(rows // groups.shape[0], 0)

    def fixed_outer(self, layer: str) -> Tensor | None:
        """See ``Block.fixed_outer``."""
        return self._parts[layer].fixed_outer

    @torch.no_grad()
    def set_pre_scale(self, group: InputGroup, scale: Tensor) -> None:
        """See ``Block.set_pre_scale``."""
        self._refuse_fixed(group.layers, "scaled")
        scale = scale.detach().float()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise UserError(f"layer '{group.layers[0]}': a scale of its input is not positive and finite")
        if not group.takes_scale:
            raise UserError(f"layer '{group.layers[0]}': its input cannot be scaled channel by channel")
        if group.layers in self._joints:
            self._divide_joint(group, scale)
            return
        layers = self._layers_of(group)
        link = self._links.get(self._leader.get(group.layers[0], group.layers[0]))
        if link is None:
            for transform in self._transforms(group):
                transform.divide(scale)
            divide_columns(layers, (), 1 / scale)
        else:
            scale = group.tie(scale)
            factors = torch.ones(link.producer.size, device=scale.device)
            factors[link.sources] = 1 / scale
            self._refuse_fixed(self._names_of(link.producer.module), "scaled")
            link.producer.multiply(factors)
            divide_columns(layers, [module for _, module in link.followers], 1 / scale)
            self._has_folded = True
        self._update(group, lambda known: known.divided_by(group.per_column(scale)))
        leader = self._leader.get(group.layers[0], group.layers[0])
        if leader in self._means:
            mean = self._means[leader]
            self._means[leader] = mean / scale.repeat_interleave(mean.shape[0] // scale.shape[0])

    def _divide_joint(self, group: InputGroup, scale: Tensor) -> None:
        assert group.fold is not None
        if group.fold.producer in self._parts:
            self._refuse_fixed([group.fold.producer], "scaled")
        self._joints[group.layers].divide(self._root, scale)
        self._has_folded = True
        self._update(group, lambda known: known.divided_by(scale))

    @torch.no_grad()
    def set_input_rotation(self, group: InputGroup, block_size: int) -> None:
        """See ``Block.set_input_rotation``."""
        self._refuse_fixed(group.layers, "rotated")
        layers = self._layers_of(group)
        if not all(layer.takes_transform and layer.quantizer.operation == "linear" for layer in layers):
            raise UserError(f"layer '{group.layers[0]}': only the inputs of linear layers can be rotated")
        turned = [rotate(layer.matrix.float(), block_size) for layer in layers]
        for transform in self._transforms(group):
            transform.rotate(block_size, layers[0].parameter.device)
        for layer, weight in zip(layers, turned, strict=True):
            layer.write(weight)
        self._update(group, lambda known: known.turned(partial(rotate, block_size=block_size)))

    def set_low_rank(self, layer: str, a: Tensor, b: Tensor) -> None:
        """See ``Block.set_low_rank``."""
        found = self._parts[layer]
        if not found.takes_low_rank:
            raise UserError(f"layer '{layer}': a low-rank branch needs a linear layer that has none yet")
        dtype = found.matrix.dtype
        a, b = (
            part.detach().to(dtype).contiguous() for part in (a, b)
        )  # as a file gives them: products differ in bits
        if isinstance(found, StackedMatrix):
            found.stack.set_low_rank(found.index, a, b)
        else:
            found.set_branch(a, b)

    def _update(self, group: InputGroup, change: Callable[[InputStatistics], InputStatistics]) -> None:
        for leader in dict.fromkeys(self._leader.get(name, name) for name in group.layers):
            known = self._statistics.get(leader)
            if known is not None and known.count:
                self._statistics[leader] = change(known)
            else:  # what is assumed of it is made when asked for
                self._changes.setdefault(leader, []).append(change)

    def _layers_of(self, group: InputGroup) -> list[BlockLayer]:
        """Layers of a group, a stack once."""
        return [self._layers[site] for site in dict.fromkeys(map(site_of, group.layers))]

    def _transforms(self, group: InputGroup) -> list[InputTransform]:
        """What is done to the inputs of a group: one for all its modules, and one for each call of a function."""
        layers = self._layers_of(group)
        plain = [layer for layer in layers if layer.caller is None]
        alone = [[layer] for layer in layers if layer.caller is not None]
        found = []
        for readers in ([plain] if plain else []) + alone:
            transform = readers[0].transform
            if transform is None:
                transform = InputTransform(group.num_channels, readers[0].transform_axis, len(readers))
                for layer in readers:
                    layer.set_transform(transform)
            found.append(transform)
        return found

    def _refuse_fixed(self, names: Iterable[str], what: str) -> None:
        for name in names:
            if self._parts[name].is_fixed:
                raise UserError(
                    f"layer '{name}': its weight is rounded already and cannot be {what} any more; "
                    "steps that scale, rotate or change weights come before those that round them"
                )

    def _names_of(self, module: nn.Module) -> list[str]:
        return [layer.name for layer in self._layers.values() if layer.owner is module]

    # Runs

    def inputs(self) -> Iterable[int]:
        """See ``Block.inputs``; here they are numbers of batches."""
        return range(self.feed.num_batches)

    def tokens(self, inputs: int) -> Tensor | None:
        """See ``Block.tokens``."""
        return self.feed.tokens(inputs)

    def targets(self) -> Iterator[Sequence[Tensor]]:
        """See ``Block.targets``."""
        for kept in self._targets:
            yield floating(kept.tree().leaves)

    def run(self, inputs: int, weights: Mapping[str, Tensor] | None = None) -> Sequence[Tensor]:
        """See ``Block.run``."""
        with self._computing_with(weights or {}):
            return floating(self.feed.run(inputs).leaves)

    @contextmanager
    def _computing_with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, forwards use these weights."""
        given = {name: layer.matrix for name, layer in self._parts.items()} if weights else {}
        sites = {site_of(name) for name in weights}
        for site in sites:
            layer, stack = self._layers[site], self._stacks.get(site)
            names = [site] if stack is None else [matrix.name for matrix in stack.matrices]
            parts = [weights.get(name, given[name]) for name in names]
            layer.quantizer.override = layer.quantizer.view.to_parameter(
                parts[0] if stack is None else torch.stack([part.to(layer.parameter.dtype) for part in parts])
            )
        try:
            yield
        finally:
            for site in sites:
                self._layers[site].quantizer.override = None

    def probe(self, *, as_before: bool = False) -> Sequence[Tensor]:
        """See ``Block.probe``."""
        with Choices(self._choices if as_before else None) as choices:
            found = self._probe()
        if not as_before:
            self._choices = choices
        return found

    def _probe(self) -> Sequence[Tensor]:
        if not self.feed.num_batches:
            return ()
        with torch.no_grad(), self._modes(lambda q: Mode.OFF):
            return floating(self.feed.run_sample().leaves)

    @torch.no_grad()
    def probe_rounded(self) -> Sequence[Tensor]:
        """See ``Block.probe_rounded``."""
        if not self.feed.num_batches:
            return ()
        tried = [layer for layer in self._layers.values() if not layer.is_fixed]
        for layer in tried:
            stack = self._stacks.get(layer.name)
            rounded = stack.rounded() if stack is not None and stack.is_touched else layer.rounded()
            layer.quantizer.override = layer.quantizer.view.to_parameter(rounded)
        try:
            return self._probe()
        finally:
            for layer in tried:
                layer.quantizer.override = None

    @torch.no_grad()
    def gather(self, needs: frozenset[Need]) -> None:
        """See ``Block.gather``."""
        self._needs = needs
        ears = Ears(self._layers, needs, self.feed.num_batches, pairs=Need.CROSS in needs and self._keeps_full)
        with self._posts.listening(ears), self._modes(self._observing_mode):
            for index in self.inputs():
                ears.tokens = self.feed.tokens(index)
                if self._keeps_full:
                    with ears.first_of_pair(), self._modes(lambda q: Mode.OFF):
                        output = self.feed.run(index, full=True)
                    self.feed.keep(index, output, full=True)
                with nullcontext() if self._experts is None else self._experts.watch():
                    output = self.feed.run(index)
                ears.forget()
                if not self._is_quantized:
                    self.feed.keep(index, output)
                if index == 0 and self._is_quantized:
                    self._reference = floating(output.leaves)
                if Need.OUTPUTS in needs:
                    self._targets.append(KeptTree.of(output, self._store))
        if not self._is_quantized and self.feed.num_batches:
            self._reference = list(self._probe())
        self._leader, self._channels, self._calls = ears.leader, ears.channels, ears.calls
        self._statistics = {name: gatherer.statistics() for name, gatherer in ears.gatherers.items()}
        self._means = {name: total / count for name, (total, count) in ears.sums.items()}

    @torch.no_grad()
    def gather_again(self, layers: Sequence[str]) -> None:
        """See ``Block.gather_again``."""
        pairs, sites = Need.CROSS in self._needs and self._keeps_full, {site_of(name) for name in layers}
        chosen = {name: layer for name, layer in self._layers.items() if name in sites}
        needs = self._needs & {Need.GRAM, Need.CROSS}
        ears = Ears(
            chosen, needs, self.feed.num_batches, pairs=pairs, leader=self._leader, enough=self._once_heard(chosen)
        )
        with self._posts.listening(ears, after=True), self._modes(lambda q: Mode.OFF):
            for index in self.inputs():
                ears.tokens = self.feed.tokens(index)
                if pairs:
                    with ears.first_of_pair(), self._computing_with(self._unrounded), suppress(Enough):
                        self.feed.run(index, full=True)
                with suppress(Enough):
                    self.feed.run(index)
                ears.forget()
        self._statistics |= {name: gatherer.statistics() for name, gatherer in ears.gatherers.items()}

    @torch.no_grad()
    def settle(self) -> Mapping[str, str]:
        """See ``Block.settle``."""
        activations = [q for q in self._quantizers if isinstance(q, ActivationQuantizer) and not q.spec.is_dynamic]
        self._observe_again(activations)
        if self._experts is not None:
            self._experts.settle()
        off = {q.name: why for q in activations if (why := q.finish())}
        for q in self._quantizers:
            if isinstance(q, ActivationQuantizer) and q.spec.is_dynamic:
                q.mode = Mode.QUANTIZE
        for stack in self._stacks.values():
            stack.settle()
        self._find_ranges(self._layers)
        return off

    def _find_ranges(self, names: Iterable[str]) -> None:
        """Ranges of weights; those that engines join agree on the scale of their scales."""
        fused = self._fused_members()
        shared, known = shared_amaxes(fused), fixed_outers(fused)
        for name in names:
            layer = self._layers[name]
            layer.quantizer.find_range(layer.parameter, shared.get(layer.quantizer), known.get(layer.quantizer))

    def _fused_members(self) -> list[list[Member]]:
        """Weights that engines join."""
        groups = [[self._layers[name] for name in names if name in self._layers] for names in self._fused]
        return [[(x.quantizer, x.parameter) for x in group] for group in groups]

    def state(self) -> BlockState:
        """See ``Block.state``."""
        found = state_of(self._model, self._quantizers, self._layers, self._before)
        knows = {"knows_groups": self._groups is not None, "knows_scale_groups": self._scale_groups is not None}
        return BlockState(found.tensors, {**found.facts, **knows})

    def recall(self, state: BlockState) -> None:
        """See ``Block.recall``. Observers and links may be shared with later blocks, and see what they saw before."""
        self.gather(frozenset())
        if state.facts["knows_groups"]:
            self.groups()
        if state.facts["knows_scale_groups"]:
            self.scale_groups()
        bring_back(self._model, self._quantizers, self._layers, state)

    @torch.no_grad()
    def advance(self) -> float | None:
        """See ``Block.advance``."""
        error = None
        if not self._is_quantized and self._reference is not None:
            error = relative_error(floating(self.feed.run_sample().leaves), self._reference)
        if self._is_quantized:
            last = self.feed.num_batches if self.feed.has_successor else min(1, self.feed.num_batches)
            for index in range(last):
                output = self.feed.run(index)
                if index == 0 and self._reference is not None:
                    error = relative_error(floating(output.leaves), self._reference)
                if self.feed.has_successor:
                    self.feed.keep(index, output)
        self.feed.release()
        for kept in self._targets:
            kept.drop()
        self._targets, self._reference, self._statistics, self._unrounded = [], None, {}, {}
        return error

    # How that is done

    def _once_heard(self, layers: Iterable[str]) -> int:
        """How many inputs of these layers a forward gives, where each comes once; 0 where that is not known."""
        leaders = {self._leader.get(name, "") for name in layers}
        once = all(self._calls[leader] == self.feed.num_batches for leader in leaders)
        return len(leaders) if once else 0

    def _observing_mode(self, quantizer: Quantizer) -> Mode:
        """Ranges that follow from the statistics are not observed a second time."""
        if not isinstance(quantizer, ActivationQuantizer) or quantizer.spec.is_dynamic:
            return Mode.OFF
        return Mode.OFF if self._follows(quantizer) else Mode.OBSERVE

    def _follows(self, quantizer: ActivationQuantizer) -> str:
        """The layer whose statistics tell the quantizer's range; empty for none."""
        name = quantizer.name.rpartition(".")[0]
        layer = self._layers.get(name)
        if (
            layer is None
            or layer.input_quantizer is not quantizer
            or not isinstance(quantizer.observer, AbsMaxObserver)
        ):
            return ""
        return name if layer.is_linear else ""

    def _observe_again(self, activations: Sequence[ActivationQuantizer]) -> None:
        """Ranges of what steps have changed: from the statistics where they tell, else by one more pass."""
        waiting = []
        for q in activations:
            known = self.statistics(self._follows(q)) if self._follows(q) else None
            if known is not None and known.count and known.low is not None and known.high is not None:
                assert isinstance(q.observer, AbsMaxObserver)
                q.observer.low, q.observer.high = float(known.low.min()), float(known.high.max())
                q.observer.count = known.count
            elif self._is_changed(q):
                waiting.append(q)
        fresh: dict[int, Any] = {}
        for q in waiting:
            q.observer = fresh.setdefault(id(q.shared or q), new_observer(q.spec))
        if waiting and self.feed.num_batches:
            with self._modes(lambda q: Mode.OBSERVE if q in waiting else Mode.OFF):
                for index in self.inputs():
                    self.feed.run(index)

    def _is_changed(self, quantizer: ActivationQuantizer) -> bool:
        layer = self._layers.get(quantizer.site)
        if layer is not None and layer.input_quantizer is quantizer:
            return layer.transform is not None or bool(self._follows(quantizer)) or self._has_folded
        return self._has_folded

    @contextmanager
    def _modes(self, choose: Any) -> Iterator[None]:
        before = [(q, q.mode) for q in self._quantizers]
        for q, _ in before:
            q.mode = choose(q)
        try:
            yield
        finally:
            for q, mode in before:
                q.mode = mode


def _taken_apart(
    layers: Mapping[str, BlockLayer], stacks: Mapping[str, Stack]
) -> dict[str, BlockLayer | StackedMatrix]:
    """What algorithms work on: layers, and in place of a stack its matrices."""
    parts: dict[str, BlockLayer | StackedMatrix] = {}
    for name, layer in layers.items():
        if name in stacks:
            parts |= {matrix.name: matrix for matrix in stacks[name].matrices}
        else:
            parts[name] = layer
    return parts
