"""Blocks of a graph: consecutive pieces of it, as algorithms see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import Tensor

from octavo.errors import UserError
from octavo.numerics.arrays import tensor_of
from octavo.numerics.block import InputGroup
from octavo.numerics.block_state import BlockState
from octavo.numerics.hadamard import rotate
from octavo.numerics.input_rounding import InputRounding, roundings_of
from octavo.numerics.qtensor import QTensor
from octavo.numerics.statistics import InputStatistics, Need
from octavo.numerics.tensor_error import relative_error
from octavo.onnx.beside import branch_of, rotation_of
from octavo.onnx.calibration import outer_of
from octavo.onnx.input_groups import GraphGroups
from octavo.onnx.pieces import Arrays, Piece, PieceSession, floats_of
from octavo.onnx.rows import Rows
from octavo.spec.facts import Slot
from octavo.spec.plan import QuantizerSpec

if TYPE_CHECKING:
    from octavo.onnx.walk import Entry, GraphWalk


class GraphBlock:
    """``numerics.block.Block`` for one piece."""

    def __init__(self, walk: GraphWalk, piece: Piece) -> None:
        self.walk = walk
        self.piece = piece
        self.name = piece.name
        self.calibration = walk.calibration
        inside = {node.name for node in piece.nodes}
        self._sites = {
            name: site
            for name, site in self.calibration.sites.items()
            if site.product is not None and site.product.name in inside
        }
        self._layers = [n for n in self._sites if self.calibration.weight_spec(n) is not None]
        self._groups = GraphGroups(piece, self._sites, self._layers, self.calibration, walk.folds_only)
        self._statistics: dict[str, InputStatistics] = {}
        self._reference: list[Tensor] = []
        self._targets: list[Entry] = []
        self._next: list[Entry] = []
        self._next_full: list[Entry] = []
        self._needs: frozenset[Need] = frozenset()
        self._has_folded = False

    # What an algorithm reads

    def layers(self) -> Sequence[str]:
        """See ``Block.layers``."""
        return self._layers

    def read_weight(self, layer: str) -> Tensor:
        """See ``Block.read_weight``."""
        return self.calibration.read_weight(layer)

    def read_bias(self, layer: str) -> Tensor | None:
        """See ``Block.read_bias``: of Gemm and Conv, and what the sum behind a MatMul adds to it."""
        value = self._groups.bias(layer)
        return None if value is None or value.const_value is None else tensor_of(value.const_value.numpy())

    def takes_bias(self, layer: str) -> bool:
        """See ``Block.takes_bias``: a graph's nodes stay as they are."""
        return False

    def add_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.add_bias``; a graph gets no biases."""
        raise UserError(f"layer '{layer}': a graph gets no biases that it had not: quantize the torch model")

    def weight_spec(self, layer: str) -> QuantizerSpec:
        """See ``Block.weight_spec``."""
        spec = self.calibration.weight_spec(layer)
        assert spec is not None
        return spec

    def input_spec(self, layer: str) -> QuantizerSpec | None:
        """See ``Block.input_spec``."""
        return self.calibration.spec(layer, Slot.INPUT)

    def takes_low_rank(self, layer: str) -> bool:
        """See ``Block.takes_low_rank``; an output quantizer would round the product without its branch."""
        site = self._sites[layer]
        is_plain = self._groups.has_own_weights([layer]) and self.calibration.spec(layer, Slot.OUTPUT) is None
        return is_plain and branch_of(site) is None

    def is_turned(self, layer: str) -> bool:
        """See ``Block.is_turned``; nothing is rotated in a graph's weights alone."""
        return False

    def groups(self) -> Sequence[InputGroup]:
        """See ``Block.groups``."""
        return self._groups.read()

    def scale_groups(self) -> Sequence[InputGroup]:
        """See ``Block.scale_groups``; a graph has no stacks of weights."""
        return self.groups()

    def placed_groups(self) -> Sequence[InputGroup]:
        """See ``Block.placed_groups``; a graph has no stacks of weights."""
        return self.groups()

    def _divide_maker(self, layer: str, scale: Tensor) -> None:
        """Every output channel of ``layer`` over its factor."""
        self.write_weight(layer, self.read_weight(layer) / scale.unsqueeze(1))
        bias = self.read_bias(layer)
        if bias is not None:
            self.write_bias(layer, bias / scale)

    def statistics(self, layer: str) -> InputStatistics:
        """See ``Block.statistics``."""
        return self._statistics.get(layer, InputStatistics(0))

    # What an algorithm changes

    def write_weight(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_weight``."""
        self.calibration.write_weight(layer, value)

    def write_bias(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_bias``."""
        found = self._groups.bias(layer)
        assert found is not None, "there is no bias to write to"
        self.calibration.write(str(found.name), value)

    def fix_weight(self, layer: str, value: QTensor) -> None:
        """See ``Block.fix_weight``."""
        self.calibration.weights[layer] = value

    def rounding_error(self, layer: str) -> Tensor:
        """See ``Block.rounding_error``; a fixed weight's initializer stays as it was."""
        rounded = self.calibration.weights.get(layer)
        rounded = self.calibration.rounded(layer) if rounded is None else rounded
        values = rounded.dequantize() if isinstance(rounded, QTensor) else rounded
        return values.float() - self.read_weight(layer)

    def mean_input(self, layer: str) -> Tensor | None:
        """See ``Block.mean_input``."""
        known = self.statistics(layer)
        return known.mean if known.total is not None and known.count else None

    def fixed_outer(self, layer: str) -> Tensor | None:
        """See ``Block.fixed_outer``."""
        return outer_of(self.calibration.weights.get(layer))

    def set_pre_scale(self, group: InputGroup, scale: Tensor) -> None:
        """See ``Block.set_pre_scale``: into the norm, or in front of the layers."""
        self._refuse_late(group.layers, "scaled")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise UserError(f"layer '{group.layers[0]}': a scale of its input is not positive and finite")
        norm = self._groups.norm(group.layers)
        if self._sites[group.layers[0]].facts.operation == "conv":
            assert group.fold is not None
            self._divide_maker(group.fold.producer, scale)
        elif norm is None:
            self._take_in(self.calibration.divide(group.layers, scale))
        for value in () if norm is None else norm.inputs[1:]:
            if value is not None and value.const_value is not None:
                self.calibration.write(str(value.name), tensor_of(value.const_value.numpy()) / scale)
        for name in group.layers:
            self.write_weight(name, self.read_weight(name) * group.per_column(scale))
            if name in self._statistics:
                self._statistics[name] = self._statistics[name].divided_by(group.per_column(scale))
        self._has_folded = True

    def _take_in(self, *nodes: ir.Node | None) -> None:
        """What is new in the graph is in this piece."""
        self.piece.nodes.extend(node for node in nodes if node is not None)

    def set_input_rotation(self, group: InputGroup, block_size: int) -> None:
        """See ``Block.set_input_rotation``: nodes in front of the layers."""
        self._refuse_late(group.layers, "rotated")
        if not self._groups.has_own_weights(group.layers):
            raise UserError(f"layer '{group.layers[0]}': only inputs of linear layers can be rotated")
        turn = partial(rotate, block_size=block_size)
        turned = {name: turn(self.read_weight(name)) for name in group.layers}
        self._take_in(*self.calibration.rotate(group.layers, block_size))
        for name, weight in turned.items():
            self.write_weight(name, weight)
            if name in self._statistics:
                self._statistics[name] = self._statistics[name].turned(turn)
        self._has_folded = True

    def set_low_rank(self, layer: str, a: Tensor, b: Tensor) -> None:
        """See ``Block.set_low_rank``: nodes beside the layer."""
        if not self.takes_low_rank(layer):
            raise UserError(f"layer '{layer}': a low-rank branch needs a linear layer that has none yet")
        self._take_in(*self.calibration.branch(layer, a, b))

    def _refuse_late(self, layers: Iterable[str], what: str) -> None:
        """What is done to an input comes before rounding, before branches, and scales before rotations."""
        for name in layers:
            site = self._sites[name]
            if name in self.calibration.weights or branch_of(site) is not None or rotation_of(site):
                raise UserError(
                    f"layer '{name}': its weight is fixed, or its input rotated already, or it has a branch, so its "
                    f"input cannot be {what} any more; steps that scale come before those that rotate and round"
                )

    # Runs

    def inputs(self) -> Iterable[int]:
        """See ``Block.inputs``."""
        return range(self.walk.num_batches)

    def tokens(self, inputs: int) -> Tensor | None:
        """See ``Block.tokens``."""
        return self.walk.tokens[inputs]

    def targets(self) -> Iterator[Sequence[Tensor]]:
        """See ``Block.targets``."""
        for entry in self._targets:
            yield floats_of(self.walk.get(entry))

    def run(self, inputs: int, weights: Mapping[str, Tensor] | None = None) -> Sequence[Tensor]:
        """See ``Block.run``; onnxruntime has no gradients and no weights for one call."""
        if weights:
            raise UserError(f"block '{self.name}': steps that learn by gradients need the model in torch, not a graph")
        return floats_of(self._float(self.walk.get(self.walk.live[inputs])))

    def probe(self, *, as_before: bool = False) -> Sequence[Tensor]:
        """See ``Block.probe``; no choices are made again."""
        return self.run(0) if self.walk.num_batches else ()

    def probe_rounded(self) -> Sequence[Tensor]:
        """See ``Block.probe_rounded``: a session cannot be given other weights for one call."""
        return ()

    def _float(self, fed: Arrays, extra: Sequence[str] = ()) -> Arrays:
        """The piece in full precision, with some tensors inside."""
        return PieceSession(self.calibration.model, self.piece, [*self.piece.outputs, *extra]).run(fed)

    def gather(self, needs: frozenset[Need]) -> None:
        """See ``Block.gather``."""
        self._needs = needs
        rows = self._rows(self._layers, needs)
        session = PieceSession(
            self.calibration.model, self.piece, [*self.piece.outputs, *rows.tensors, *self._observed()]
        )
        for index in self.inputs():
            other = session.run(self.walk.get(self.walk.full[index])) if self.walk.keeps else None
            found = session.run(self.walk.get(self.walk.live[index]))
            self._look(found)
            rows.take(index, found, other)
            if index == 0:
                self._reference = floats_of({name: found[name] for name in self.piece.outputs if name in found})
            if Need.OUTPUTS in needs:
                self._targets.append(self.walk.keep({n: found[n] for n in self.piece.outputs}))
            if not self.walk.is_quantized:
                self._next.append(self.walk.keep({n: found[n] for n in self.piece.outputs}))
            if other is not None:
                self._next_full.append(self.walk.keep({n: other[n] for n in self.piece.outputs}))
        self._statistics = rows.statistics()

    def gather_again(self, layers: Sequence[str], *, rounded: bool = False) -> None:
        """See ``Block.gather_again``: the graph has its weights in full precision, and fixed ones for as long."""
        rounding = roundings_of(self, layers) if rounded else {}
        again = self._rows(layers, self._needs & {Need.GRAM, Need.CROSS}, pairs_all=True, rounding=rounding)
        fixed = [name for name in self._layers if name in self.calibration.weights]
        full = PieceSession(self.calibration.model, self.piece, again.tensors) if self.walk.keeps else None
        with self.calibration.computing_with_fixed(fixed):
            session = PieceSession(self.calibration.model, self.piece, again.tensors)
        for index in self.inputs():
            other = None if full is None else full.run(self.walk.get(self.walk.full[index]))
            again.take(index, session.run(self.walk.get(self.walk.live[index])), other)
        self._statistics |= again.statistics()

    def _rows(
        self,
        layers: Iterable[str],
        needs: frozenset[Need],
        *,
        pairs_all: bool = False,
        rounding: Mapping[str, InputRounding] | None = None,
    ) -> Rows:
        sites = {name: self._sites[name] for name in layers}
        needs = needs if self.walk.keeps else needs - {Need.CROSS}
        return Rows(sites, needs, self.walk.tokens, pairs_all=pairs_all, rounding=rounding)

    def _observed(self) -> list[str]:
        return self.calibration.observed_in(self._sites)

    def _look(self, found: Arrays) -> None:
        self.calibration.look(self._sites, found)

    def settle(self) -> Mapping[str, str]:
        """See ``Block.settle``."""
        if self._has_folded and (observed := self._observed()):
            self.calibration.forget(self._sites)
            session = PieceSession(self.calibration.model, self.piece, observed)
            for index in self.inputs():
                self._look(session.run(self.walk.get(self.walk.live[index])))
        return self.calibration.settle(self._sites)

    def state(self) -> BlockState:
        """See ``Block.state``."""
        return self.calibration.state(self._sites)

    def recall(self, state: BlockState) -> None:
        """See ``Block.recall``."""
        self.gather(frozenset())
        self._take_in(*self.calibration.bring_back(self._sites, state))

    def advance(self) -> float | None:
        """See ``Block.advance``."""
        error = None
        if self.walk.num_batches and self.walk.is_quantized:
            session = PieceSession(self.calibration.simulated(self._sites), self.piece, self.piece.outputs)
            for index in self.inputs():
                found = session.run(self.walk.get(self.walk.live[index]))
                if index == 0:
                    error = relative_error(floats_of(found), self._reference)
                self.walk.replace(self.walk.live, index, found)
        for waiting, entries in ((self._next, self.walk.live), (self._next_full, self.walk.full)):
            for index, entry in enumerate(waiting):
                self.walk.store.drop(entries[index][1])
                entries[index] = entry
        for entry in self._targets:
            self.walk.store.drop(entry[1])
        self._targets, self._reference, self._statistics = [], [], {}
        return error
