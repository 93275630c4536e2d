"""Links between what makes a tensor and those that read it, found once for blocks that are built alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor, nn

from octavo.nn.block_layers import BlockLayer
from octavo.nn.extras import InputTransform, Listener, LowRank
from octavo.nn.flow import Link, LinkFinder, Trial
from octavo.nn.posts import Posts
from octavo.nn.quantizer import Quantizer

KnownLinks = MutableMapping[object, dict[str, Link | None]]
"""What blocks are like -> their links, by names inside."""


class Links:
    """Finds a block's links by trials.

    Args:
        root: The module that the block is, or the model.
        prefix: Of names inside; empty for the model.
        layers: Those with a quantized weight.
        posts: Where they are heard.
        probe: Runs the block on a few samples.
        known: Links of blocks that are built alike, which are not looked for again.
    """

    def __init__(
        self,
        root: nn.Module,
        prefix: str,
        layers: Mapping[str, BlockLayer],
        posts: Posts,
        probe: Callable[[], Sequence[Tensor]],
        *,
        known: KnownLinks,
    ) -> None:
        self._root, self._prefix, self._layers = root, prefix, layers
        self._posts, self._probe, self._known = posts, probe, known

    def find(self, by_leader: Mapping[str, Sequence[str]]) -> dict[str, Link | None]:
        """First layer of a group -> its link, ``None`` for none."""
        key = self._likeness(by_leader)
        if key in self._known:
            return {f"{self._prefix}{name}": self._moved(link) for name, link in self._known[key].items()}
        found = self._tried_links(by_leader)
        if self._prefix:
            self._known[key] = {name.removeprefix(self._prefix): link for name, link in found.items()}
        return found

    def _likeness(self, by_leader: Mapping[str, Sequence[str]]) -> object:
        """Equal for blocks of one class with the same groups of layers of the same shapes."""
        shapes = tuple((layer.name, layer.quantizer.view.shape) for layer in self._layers.values())
        names = [(name.removeprefix(self._prefix), shape) for name, shape in shapes]
        groups = tuple(tuple(name.removeprefix(self._prefix) for name in names) for names in by_leader.values())
        return type(self._root), tuple(names), groups

    def _moved(self, link: Link | None) -> Link | None:
        """The link of a block that is built alike, in this one."""
        if link is None:
            return None
        producer = replace(link.producer, module=self._root.get_submodule(link.producer.path))
        followers = tuple((path, self._root.get_submodule(path)) for path, _ in link.followers)
        return Link(producer, link.sources, followers)

    def _tried_links(self, by_leader: Mapping[str, Sequence[str]]) -> dict[str, Link | None]:
        modules = {path: module for path, module in self._root.named_modules() if not _is_ours(module)}
        finder = LinkFinder(Trial(self._trial, modules), list(self._layers.values()))
        return {leader: finder.find([self._layers[name] for name in names]) for leader, names in by_leader.items()}

    def _trial(self, layers: Sequence[BlockLayer]) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        heard: dict[str, list[Tensor]] = {}
        with ExitStack() as cleanup:
            for layer in layers:
                cleanup.enter_context(self._posts.heard_by(layer, heard.setdefault(layer.name, []).append))
            outputs = self._probe()
        return outputs, {name: inputs[0] for name, inputs in heard.items() if len(inputs) == 1}


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (Quantizer, InputTransform, LowRank, Listener))
