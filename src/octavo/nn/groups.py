"""Groups of layers beyond those that read one tensor: what reads parts of one, and what stands at one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.nn.block_layers import BlockLayer
from octavo.nn.experts import find_experts
from octavo.nn.joints import Joint, JointFinder
from octavo.nn.snapshot import stored_parameter
from octavo.numerics.block import Fold, InputGroup, matrix_name, site_of


@dataclass(frozen=True, slots=True)
class Grouping:
    """Makes groups.

    Args:
        root: The block.
        prefix: Of its names in the model.
        layers: By site.
        stacks: Sites whose matrices algorithms see one by one.
        folds_only: Layers whose input takes a scale only where it can be folded.
    """

    root: nn.Module
    prefix: str
    layers: Mapping[str, BlockLayer]
    stacks: AbstractSet[str]
    folds_only: AbstractSet[str]

    def placed(self, names: Sequence[str], groups: Sequence[InputGroup]) -> list[InputGroup]:
        """See ``Block.placed_groups``.

        Args:
            names: All layers, and matrices of stacks.
            groups: What reads one tensor.
        """
        joined: list[set[str]] = []
        for group in groups:
            sites = {site_of(name) for name in group.layers}
            if any(not self.layers[site].is_plain for site in sites):
                touching = [part for part in joined if part & sites]
                joined = [*(part for part in joined if part not in touching), sites.union(*touching)]
        return in_order(names, groups, [self._placed_group(names, sites) for sites in joined])

    def _placed_group(self, names: Sequence[str], sites: AbstractSet[str]) -> InputGroup:
        """Everything that reads what some sites read; each of them has a place for what is done to it."""
        layers = [self.layers[site] for site in sites]
        takes_scale = all(x.takes_transform and (x.matrix.ndim == 2 or x.name in self.stacks) for x in layers)
        width = layers[0].quantizer.view.matrix_shape[-1]
        mine = tuple(name for name in names if site_of(name) in sites)
        return InputGroup(mine, width, takes_scale=takes_scale and not self.folds_only & sites)

    def likeness(self) -> object:
        """Equal for blocks that have the same joints; ``None`` where there is nothing to look for."""
        lists = self._lists()
        functional = tuple((x.name.removeprefix(self.prefix), x.parameter.shape) for x in self._functional())
        return (type(self.root), functional, lists) if functional or lists else None

    def find(self, probe: Callable[[], Sequence[Tensor]]) -> tuple[Joint, ...]:
        """All joints of the block, whose forward ``probe`` is."""
        keys = [(x.quantizer.key.removeprefix(self.prefix), x.name in self.stacks) for x in self._functional()]
        return JointFinder(self.root, probe, self._lists()).find(keys)

    def _functional(self) -> list[BlockLayer]:
        """Weights that functions compute with."""
        return [x for x in self.layers.values() if x.name in self.stacks or (x.is_linear and not x.is_plain)]

    def _lists(self) -> tuple[tuple[str, ...], ...]:
        """Keys in the block of each weight that every expert of a list has."""
        own = {x.quantizer.key.removeprefix(self.prefix) for x in self.layers.values() if x.is_plain and x.is_linear}
        found: dict[tuple[str, str], list[str]] = {}
        for experts in find_experts(self.root):
            prefix = f"{experts.path}."
            for key in (key for key in own if experts.is_list and key.startswith(prefix)):
                found.setdefault((prefix, key.removeprefix(prefix).partition(".")[2]), []).append(key)
        return tuple(tuple(sorted(keys)) for _, keys in sorted(found.items()))

    def joined(self, names: Sequence[str], joints: Iterable[Joint]) -> Iterator[tuple[InputGroup, Joint]]:
        """The group of each joint: all quantized layers that read it."""
        for joint in joints:
            readers = {id(stored_parameter(self.root, reader.key)) for reader in joint.readers}
            sites = [layer.name for layer in self.layers.values() if id(layer.parameter) in readers]
            if any(self.layers[site].matrix.ndim > 2 and site not in self.stacks for site in sites):
                continue  # one scale for matrices that are not seen one by one
            mine = [name for name in names if site_of(name) in sites]
            if joint.index >= 0:
                mine = [matrix_name(site, joint.index) for site in sites]
            size = joint.readers[0].stop
            fold = Fold(self._maker_of(joint), torch.arange(size, device=self.layers[sites[0]].parameter.device))
            yield InputGroup(tuple(mine), size, fold), joint

    def _maker_of(self, joint: Joint) -> str:
        """The site, or matrix of one, whose rows make what a joint's readers read; a norm's path."""
        if joint.index < 0:
            return f"{self.prefix}{joint.producer}"
        made = stored_parameter(self.root, joint.producer)
        site = next((layer.name for layer in self.layers.values() if layer.parameter is made), joint.producer)
        return matrix_name(site, joint.index)


def in_order(names: Sequence[str], groups: Sequence[InputGroup], instead: Sequence[InputGroup]) -> list[InputGroup]:
    """``groups``, with ``instead`` in place of those whose layers they hold; what they leave over takes no scale."""
    found = {name: group for group in instead for name in group.layers}
    for group in groups:
        over = tuple(name for name in group.layers if name not in found)
        rest = group if over == group.layers else InputGroup(over, group.num_channels, takes_scale=False)
        found |= dict.fromkeys(over, rest)
    return list({found[name].layers: found[name] for name in names}.values())
