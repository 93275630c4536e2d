"""Blocks of a torch model as algorithms see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.block_parts import BlockParts
from octavo.nn.block_ranges import BlockRanges
from octavo.nn.block_state import bring_back, state_of, versions
from octavo.nn.calls import KeptTree, floating
from octavo.nn.choices import Choices
from octavo.nn.ears import Ears, Enough
from octavo.nn.experts import ExpertWatch
from octavo.nn.feeds import Feed
from octavo.nn.heard import Heard
from octavo.nn.input_groups import InputGroups, KnownJoints
from octavo.nn.links import KnownLinks
from octavo.nn.quantizer import Mode, Quantizer
from octavo.nn.stacks import StackedMatrix
from octavo.numerics.block import InputGroup, site_of
from octavo.numerics.block_state import BlockState
from octavo.numerics.input_rounding import roundings_of
from octavo.numerics.qtensor import QTensor
from octavo.numerics.statistics import InputStatistics, Need
from octavo.numerics.store import Store
from octavo.numerics.tensor_error import relative_error
from octavo.spec.plan import QuantizerSpec


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all blocks of a walk have in common.

    Args:
        store: Where outputs wait.
        is_quantized: What comes next gets simulated outputs.
        keeps_full: The unquantized path is followed, too.
        fused: Names of layers that engines join, group by group.
        experts: Counts the tokens of experts.
        folds_only: Layers whose input takes a scale only where it can be folded.
        turned: Keys of weights whose inputs a rotation of weights has turned.
        links: Known of blocks so far, by what they are like.
        joints: The same.
    """

    store: Store
    is_quantized: bool
    keeps_full: bool
    fused: Sequence[Sequence[str]] = ()
    experts: ExpertWatch | None = None
    folds_only: AbstractSet[str] = frozenset()
    turned: AbstractSet[str] = frozenset()
    links: KnownLinks = field(default_factory=dict)
    joints: KnownJoints = field(default_factory=dict)


class TorchBlock:
    """``numerics.block.Block`` for a part of a torch model.

    Args:
        name: Path of the module, or what a segment between blocks is called.
        model: The whole model.
        root: The module that the block is, or the model.
        quantizers: Those that belong to the block.
        feed: See there.
        around: What all blocks of the walk have in common.
    """

    def __init__(
        self,
        name: str,
        *,
        model: nn.Module,
        root: nn.Module,
        quantizers: Sequence[Quantizer],
        feed: Feed,
        around: Surroundings,
    ) -> None:
        self.name = name
        self.feed = feed
        self._model, self._around = model, around
        self._parts = BlockParts(name, model, root, quantizers)
        self._heard = Heard(self._parts)
        self._ranges = BlockRanges(self._parts, self._heard, around.fused)
        self._groups = InputGroups(
            self._parts,
            self._heard,
            self._probe,
            known_links=around.links,
            known_joints=around.joints,
            folds_only=around.folds_only,
        )
        self._choices = Choices()
        self._needs: frozenset[Need] = frozenset()
        self._unrounded: dict[str, Tensor] = {}
        self._targets: list[KeptTree] = []
        self._reference: list[Tensor] | None = None
        self._before = versions(model)

    # What an algorithm reads

    def layers(self) -> Sequence[str]:
        """See ``Block.layers``."""
        return self._heard.layers()

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
        return self._heard.statistics(layer)

    def mean_input(self, layer: str) -> Tensor | None:
        """See ``Block.mean_input``."""
        return self._heard.mean_input(layer)

    def is_turned(self, layer: str) -> bool:
        """See ``Block.is_turned``."""
        return self._parts.layers[site_of(layer)].quantizer.key in self._around.turned

    def groups(self) -> Sequence[InputGroup]:
        """See ``Block.groups``."""
        return self._groups.reading()

    def scale_groups(self) -> Sequence[InputGroup]:
        """See ``Block.scale_groups``."""
        return self._groups.scaling()

    def placed_groups(self) -> Sequence[InputGroup]:
        """See ``Block.placed_groups``."""
        return self._groups.placed()

    def fixed_outer(self, layer: str) -> Tensor | None:
        """See ``Block.fixed_outer``."""
        return self._parts[layer].fixed_outer

    @torch.no_grad()
    def rounding_error(self, layer: str) -> Tensor:
        """See ``Block.rounding_error``."""
        part = self._parts[layer]
        if part.is_fixed:
            return part.matrix.float() - self._unrounded[layer].float()
        if isinstance(part, StackedMatrix):
            return part.nearest().dequantize() - part.matrix.float()
        return self._ranges.rounding_error(layer)

    # What an algorithm changes

    def write_weight(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_weight``."""
        self._parts.refuse_fixed((layer,), "written to")
        self._parts[layer].write(value)

    @torch.no_grad()
    def write_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_bias``."""
        bias = self._parts.layers[layer].bias
        assert bias is not None, "there is no bias to write to"
        bias.copy_(value)

    def add_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.add_bias``."""
        self._parts.layers[layer].add_bias(value)

    @torch.no_grad()
    def fix_weight(self, layer: str, value: QTensor) -> None:
        """See ``Block.fix_weight``."""
        found = self._parts[layer]
        if Need.UNROUNDED in self._needs:
            self._unrounded[layer] = found.matrix.clone()
        found.fix(value)

    def set_pre_scale(self, group: InputGroup, scale: Tensor) -> None:
        """See ``Block.set_pre_scale``."""
        self._groups.divide(group, scale)

    def set_input_rotation(self, group: InputGroup, block_size: int) -> None:
        """See ``Block.set_input_rotation``."""
        self._groups.rotate(group, block_size)

    def set_low_rank(self, layer: str, a: Tensor, b: Tensor) -> None:
        """See ``Block.set_low_rank``."""
        found = self._parts[layer]
        if not found.takes_low_rank:
            raise UserError(f"layer '{layer}': a low-rank branch needs a linear layer that has none yet")
        dtype = found.matrix.dtype  # as a file gives them: products differ in bits
        a, b = (part.detach().to(dtype).contiguous() for part in (a, b))
        if isinstance(found, StackedMatrix):
            found.stack.set_low_rank(found.index, a, b)
        else:
            found.set_branch(a, b)

    # Runs

    def inputs(self) -> range:
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
        with self._parts.computing_with(weights or {}):
            return floating(self.feed.run(inputs).leaves)

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
        with torch.no_grad(), self._unquantized():
            return floating(self.feed.run_sample().leaves)

    @torch.no_grad()
    def probe_rounded(self) -> Sequence[Tensor]:
        """See ``Block.probe_rounded``."""
        if not self.feed.num_batches:
            return ()
        with self._parts.computing_rounded():
            return self._probe()

    def _unquantized(self) -> AbstractContextManager[None]:
        return self._parts.modes(lambda q: Mode.OFF)

    @torch.no_grad()
    def gather(self, needs: frozenset[Need]) -> None:
        """See ``Block.gather``."""
        self._needs, is_quantized = needs, self._around.is_quantized
        pairs = Need.CROSS in needs and self._around.keeps_full
        ears = Ears(self._parts.layers, needs, self.feed.num_batches, pairs=pairs)
        with self._parts.posts.listening(ears), self._parts.modes(self._ranges.observing):
            for index in self.inputs():
                ears.tokens = self.feed.tokens(index)
                if self._around.keeps_full:
                    with ears.first_of_pair(), self._unquantized():
                        output = self.feed.run(index, full=True)
                    self.feed.keep(index, output, full=True)
                with nullcontext() if self._around.experts is None else self._around.experts.watch():
                    output = self.feed.run(index)
                ears.forget()
                if not is_quantized:
                    self.feed.keep(index, output)
                elif index == 0:
                    self._reference = floating(output.leaves)
                if Need.OUTPUTS in needs:
                    self._targets.append(KeptTree.of(output, self._around.store))
        if not is_quantized and self.feed.num_batches:
            self._reference = list(self._probe())
        self._heard.take(ears)

    @torch.no_grad()
    def gather_again(self, layers: Sequence[str], *, rounded: bool = False) -> None:
        """See ``Block.gather_again``."""
        pairs = Need.CROSS in self._needs and self._around.keeps_full
        sites = {site_of(name) for name in layers}
        chosen = {name: layer for name, layer in self._parts.layers.items() if name in sites}
        num_batches = self.feed.num_batches
        ears = Ears(
            chosen,
            self._needs & {Need.GRAM, Need.CROSS},
            num_batches,
            pairs=pairs,
            leader=self._heard.leader,
            rounding=roundings_of(self, layers) if rounded else {},
            enough=self._heard.once_heard(chosen, num_batches),
        )
        with self._parts.posts.listening(ears, after=True), self._unquantized():
            for index in self.inputs():
                ears.tokens = self.feed.tokens(index)
                if pairs:
                    with ears.first_of_pair(), self._parts.computing_with(self._unrounded), suppress(Enough):
                        self.feed.run(index, full=True)
                with suppress(Enough):
                    self.feed.run(index)
                ears.forget()
        self._heard.take_again(ears)

    @torch.no_grad()
    def settle(self) -> Mapping[str, str]:
        """See ``Block.settle``."""
        self._ranges.observe_again(self._run_all, has_folded=self._groups.has_folded)
        if self._around.experts is not None:
            self._around.experts.settle()
        off = self._ranges.finish()
        for stack in self._parts.stacks.values():
            stack.settle()
        self._ranges.find(self._parts.layers)
        return off

    def _run_all(self) -> None:
        for index in self.inputs():
            self.feed.run(index)

    @torch.no_grad()
    def advance(self) -> float | None:
        """See ``Block.advance``."""
        error = self._hand_on() if self._around.is_quantized else self._error_of_sample()
        self.feed.release()
        for kept in self._targets:
            kept.drop()
        self._targets, self._reference, self._unrounded = [], None, {}
        self._heard.forget()
        return error

    def _hand_on(self) -> float | None:
        """Every output to what comes next; the error of the first."""
        error = None
        for index in self.inputs() if self.feed.has_successor else self.inputs()[:1]:
            output = self.feed.run(index)
            if index == 0 and self._reference is not None:
                error = relative_error(floating(output.leaves), self._reference)
            if self.feed.has_successor:
                self.feed.keep(index, output)
        return error

    def _error_of_sample(self) -> float | None:
        if self._reference is None:
            return None
        return relative_error(floating(self.feed.run_sample().leaves), self._reference)

    # Checkpoints

    def state(self) -> BlockState:
        """See ``Block.state``."""
        found = state_of(self._model, self._parts.quantizers, self._parts.layers, self._before)
        return BlockState(found.tensors, {**found.facts, **self._groups.known()})

    def recall(self, state: BlockState) -> None:
        """See ``Block.recall``. Observers and links may be shared with later blocks, and see what they saw before."""
        self.gather(frozenset())
        self._groups.recall(state.facts)
        bring_back(self._model, self._parts.quantizers, self._parts.layers, state)
