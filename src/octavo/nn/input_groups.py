"""Groups of layers that agree on what is done to their input, and the doing: factors and rotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import torch
from torch import Tensor

from octavo.errors import UserError
from octavo.nn.block_parts import BlockParts
from octavo.nn.flow import Link, Producer, divide_columns
from octavo.nn.groups import Grouping, in_order
from octavo.nn.heard import Heard
from octavo.nn.joints import Joint
from octavo.nn.links import KnownLinks, Links
from octavo.numerics.block import Fold, InputGroup
from octavo.numerics.hadamard import rotate

KnownJoints = MutableMapping[object, tuple[Joint, ...]]
"""What blocks are like -> their joints."""


class InputGroups:
    """Of one block; each kind of groups is looked for when it is first asked for.

    Args:
        parts: Of the block.
        heard: What reads what.
        probe: Runs the block on a few samples, unquantized.
        known_links: Links of blocks that are built alike, which are not looked for again.
        known_joints: Joints of such blocks.
        folds_only: Layers whose input takes a scale only where it can be folded.
    """

    def __init__(
        self,
        parts: BlockParts,
        heard: Heard,
        probe: Callable[[], Sequence[Tensor]],
        *,
        known_links: KnownLinks,
        known_joints: KnownJoints,
        folds_only: AbstractSet[str],
    ) -> None:
        self._parts, self._heard, self._probe = parts, heard, probe
        self._known_links, self._known_joints = known_links, known_joints
        self._folds_only = folds_only
        self._grouping = Grouping(parts.root, parts.prefix, parts.layers, parts.stacks.keys(), folds_only)
        self._links: dict[str, Link | None] = {}
        self._joints: dict[tuple[str, ...], Joint] = {}
        self._reading: list[InputGroup] | None = None
        self._scaling: list[InputGroup] | None = None
        self.has_folded = False
        """A factor was moved into what makes an input."""

    def known(self) -> dict[str, bool]:
        """Which kinds were looked for, as ``recall`` takes it."""
        return {"knows_groups": self._reading is not None, "knows_scale_groups": self._scaling is not None}

    def recall(self, known: Mapping[str, bool]) -> None:
        """Look for what was looked for before: links and joints may be those of later blocks, too."""
        if known["knows_groups"]:
            self.reading()
        if known["knows_scale_groups"]:
            self.scaling()

    def reading(self) -> Sequence[InputGroup]:
        """See ``Block.groups``."""
        if self._reading is None:
            readers = self._heard.readers()
            self._links = self._found_links(readers) if self._heard.leader else {}
            self._reading = [self._group(leader, tuple(names)) for leader, names in readers.items()]
        return self._reading

    def placed(self) -> Sequence[InputGroup]:
        """See ``Block.placed_groups``."""
        return self._grouping.placed(self._heard.layers(), self.reading())

    def scaling(self) -> Sequence[InputGroup]:
        """See ``Block.scale_groups``."""
        if self._scaling is None:
            names = self._heard.layers()
            found = list(self._grouping.joined(names, self._found_joints()))
            self._joints = {group.layers: joint for group, joint in found}
            self._scaling = in_order(names, self.placed(), [group for group, _ in found])
        return self._scaling

    def _found_links(self, readers: Mapping[str, Sequence[str]]) -> dict[str, Link | None]:
        parts = self._parts
        scalable = {leader: names for leader, names in readers.items() if all(parts[x].takes_scale for x in names)}
        finder = Links(parts.root, parts.prefix, parts.layers, parts.posts, self._probe, known=self._known_links)
        return finder.find(scalable)

    def _found_joints(self) -> tuple[Joint, ...]:
        key = self._grouping.likeness()
        if key is None or not self._heard.leader:
            return ()
        if key not in self._known_joints:
            self._known_joints[key] = self._grouping.find(self._probe)
        return self._known_joints[key]

    def _group(self, leader: str, names: tuple[str, ...]) -> InputGroup:
        layer = self._parts.layers.get(leader)
        if layer is None or not all(self._parts[name].takes_scale for name in names):
            channels = self._heard.num_channels(leader, self._parts[leader].matrix.shape[-1])
            return InputGroup(names, channels, takes_scale=False)
        channels = self._heard.num_channels(leader, layer.quantizer.view.matrix_shape[-1])
        link = self._links.get(leader)
        fold = None if link is None else Fold(self._name_of(link.producer), link.sources)
        takes_scale = fold is not None or not self._folds_only & set(names)
        return InputGroup(names, channels, fold, layer.columns(channels), takes_scale)

    def _name_of(self, producer: Producer) -> str:
        """A producer's site, or its path where it has no quantized weight."""
        sites = self._parts.names_of(producer.module)
        return sites[0] if sites else f"{self._parts.prefix}{producer.path}"

    @torch.no_grad()
    def divide(self, group: InputGroup, scale: Tensor) -> None:
        """See ``Block.set_pre_scale``."""
        self._parts.refuse_fixed(group.layers, "scaled")
        scale = scale.detach().float()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise UserError(f"layer '{group.layers[0]}': a scale of its input is not positive and finite")
        if not group.takes_scale:
            raise UserError(f"layer '{group.layers[0]}': its input cannot be scaled channel by channel")
        link = self._links.get(self._heard.leader_of(group.layers[0]))
        if group.layers in self._joints:
            self._fold_into_joint(group, scale)
        elif link is not None:
            scale = group.tie(scale)
            self._fold_into_producer(group, link, scale)
        else:
            for transform in self._parts.transforms(group):
                transform.divide(scale)
            divide_columns(self._parts.layers_of(group), (), 1 / scale)
        self._heard.divide(group, scale)

    def _fold_into_joint(self, group: InputGroup, scale: Tensor) -> None:
        assert group.fold is not None
        if group.fold.producer in self._parts.by_name:
            self._parts.refuse_fixed([group.fold.producer], "scaled")
        self._joints[group.layers].divide(self._parts.root, scale)
        self.has_folded = True

    def _fold_into_producer(self, group: InputGroup, link: Link, scale: Tensor) -> None:
        factors = torch.ones(link.producer.size, device=scale.device)
        factors[link.sources] = 1 / scale
        self._parts.refuse_fixed(self._parts.names_of(link.producer.module), "scaled")
        link.producer.multiply(factors)
        divide_columns(self._parts.layers_of(group), [module for _, module in link.followers], 1 / scale)
        self.has_folded = True

    @torch.no_grad()
    def rotate(self, group: InputGroup, block_size: int) -> None:
        """See ``Block.set_input_rotation``."""
        self._parts.refuse_fixed(group.layers, "rotated")
        layers = self._parts.layers_of(group)
        if not all(layer.takes_transform and layer.quantizer.operation == "linear" for layer in layers):
            raise UserError(f"layer '{group.layers[0]}': only the inputs of linear layers can be rotated")
        turned = [rotate(layer.matrix.float(), block_size) for layer in layers]
        for transform in self._parts.transforms(group):
            transform.rotate(block_size, layers[0].parameter.device)
        for layer, weight in zip(layers, turned, strict=True):
            layer.write(weight)
        self._heard.change(group.layers, lambda known: known.turned(partial(rotate, block_size=block_size)))
