"""Groups of a graph's layers that read one tensor, and what before them can take a factor in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import onnx_ir as ir
import torch

from octavo.numerics.block import Fold, InputGroup
from octavo.onnx.calibration import Calibration
from octavo.onnx.convolutions import maker_of
from octavo.onnx.graph import GraphSite, whole
from octavo.onnx.pieces import NORM, Piece
from octavo.onnx.rows import is_grouped, kernel_of
from octavo.spec.facts import Slot


class GraphGroups:
    """Of one piece.

    Args:
        piece: The piece.
        sites: Those inside, by name.
        layers: Of them, those whose weight gets a quantizer.
        calibration: What is fixed already.
        folds_only: Layers whose input takes a scale only where a norm takes it in.
    """

    def __init__(
        self,
        piece: Piece,
        sites: Mapping[str, GraphSite],
        layers: Sequence[str],
        calibration: Calibration,
        folds_only: AbstractSet[str],
    ) -> None:
        self._piece, self._sites, self._layers = piece, sites, layers
        self._calibration, self._folds_only = calibration, folds_only

    def read(self) -> Sequence[InputGroup]:
        """See ``Block.groups``."""
        by_tensor: dict[str, list[str]] = {}
        for name in self._layers:
            slot = Slot.INPUT if Slot.INPUT in self._sites[name].operands else Slot.WEIGHT
            tensor = str(self._sites[name].operands[slot].value.name) if slot is Slot.INPUT else name
            by_tensor.setdefault(tensor, []).append(name)
        return [self._group(tuple(names)) for names in by_tensor.values()]

    def _group(self, names: tuple[str, ...]) -> InputGroup:
        if self._sites[names[0]].facts.operation == "conv":
            return self._conv_group(names)
        width = self._sites[names[0]].facts.weight_shape[1]
        norm = self.norm(names)
        fold = None if norm is None else Fold(str(norm.name), torch.arange(width))
        takes_scale = self.has_own_weights(names) and (fold is not None or not self._folds_only & set(names))
        return InputGroup(names, width, fold, None, takes_scale=takes_scale)

    def _conv_group(self, names: tuple[str, ...]) -> InputGroup:
        """Convolutions of one tensor; the layer before takes a factor where it has one kernel of columns to go to."""
        positions = {math.prod(kernel_of(self._sites[name])) for name in names}
        width = self._sites[names[0]].facts.weight_shape[1]
        if len(positions) > 1 or any(is_grouped(self._sites[name]) for name in names):
            return InputGroup(names, width, None, None, takes_scale=False)
        (inside,) = positions
        columns = torch.arange(width // inside).repeat_interleave(inside)
        maker = self._maker(names)
        fold = None if maker is None else Fold(maker, torch.arange(width // inside))
        return InputGroup(names, width // inside, fold, columns, takes_scale=fold is not None)

    def _maker(self, names: tuple[str, ...]) -> str | None:
        """The layer of this piece whose channels only these read, and whose weight and bias can take a factor."""
        sites = [self._sites[name] for name in names]
        value = sites[0].operands[Slot.INPUT].value
        readers = {site.product.name for site in sites if site.product is not None}
        alone = {user.name for user in value.consumers()} <= readers and not value.is_graph_output()
        own = all(len(site.operands[Slot.WEIGHT].value.uses()) == 1 for site in sites)
        node = maker_of(value) if alone and own else None
        found = next((n for n in self._layers if self._sites[n].product is node), None) if node is not None else None
        if found is None or node is None or len(self._sites[found].operands[Slot.WEIGHT].value.uses()) > 1:
            return None
        has_own_bias = len(node.inputs) < 3 or node.inputs[2] is None or self.bias(found) is not None
        return found if has_own_bias and found not in self._calibration.weights else None

    def has_own_weights(self, names: Iterable[str]) -> bool:
        """Whether scaling the columns of these layers' weights changes nothing else."""
        sites = [self._sites[name] for name in names]
        return all(s.facts.operation == "linear" and len(s.operands[Slot.WEIGHT].value.uses()) == 1 for s in sites)

    def norm(self, names: tuple[str, ...]) -> ir.Node | None:
        """The norm of this piece that only these layers read, with constants that can be scaled."""
        sites = [self._sites[name] for name in names]
        if any(site.facts.operation != "linear" for site in sites):
            return None
        value = sites[0].operands[Slot.INPUT].value
        norm = value.producer()
        readers = {site.product.name for site in sites if site.product is not None}
        if norm is None or norm.op_type != NORM or norm not in self._piece.nodes or value.is_graph_output():
            return None
        alone = {user.name for user in value.consumers()} <= readers
        return norm if alone and all(v is None or v.is_initializer() for v in norm.inputs[1:]) else None

    def bias(self, layer: str) -> ir.Value | None:
        """The initializer that nothing but this layer's output is added to."""
        node, width = self._sites[layer].product, self._sites[layer].facts.weight_shape[0]
        if node is None:
            return None
        users = list(whole(node).consumers())
        if node.op_type in ("Gemm", "Conv"):
            found = node.inputs[2] if len(node.inputs) > 2 else None
        elif (
            node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add" and users[0] in self._piece.nodes
        ):
            found = next((value for value in users[0].inputs if value is not None and value.is_initializer()), None)
        else:
            found = None
        if found is None or found.const_value is None or len(found.consumers()) != 1:
            return None
        return found if tuple(found.const_value.shape.numpy()) == (width,) else None
