"""The weights of a block: its layers, and in place of a stack of weights the matrices in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from octavo.errors import UserError
from octavo.nn.block_layers import BlockLayer, block_layers
from octavo.nn.extras import InputTransform
from octavo.nn.posts import Posts
from octavo.nn.quantizer import Mode, Quantizer
from octavo.nn.stacks import Stack, StackedMatrix, takes_apart
from octavo.numerics.block import InputGroup, site_of


class BlockParts:
    """What algorithms work on, by name, and what forwards compute with meanwhile.

    Args:
        name: Path of the block's module.
        model: The whole model.
        root: The module that the block is, or the model.
        quantizers: Those that belong to the block.
    """

    def __init__(self, name: str, model: nn.Module, root: nn.Module, quantizers: Sequence[Quantizer]) -> None:
        self.root = root
        self.prefix = "" if root is model else f"{name}."
        """Of the names of what is inside."""
        self.quantizers = list(quantizers)
        self.layers = block_layers(model, self.quantizers)
        self.stacks = {name: Stack(layer) for name, layer in self.layers.items() if takes_apart(layer)}
        self.by_name = _taken_apart(self.layers, self.stacks)
        self.posts = Posts(root, self.stacks.keys())

    def __getitem__(self, name: str) -> BlockLayer | StackedMatrix:
        return self.by_name[name]

    def layers_of(self, group: InputGroup) -> list[BlockLayer]:
        """Layers of a group, a stack once."""
        return [self.layers[site] for site in dict.fromkeys(map(site_of, group.layers))]

    def names_of(self, module: nn.Module) -> list[str]:
        """Layers whose weight a module has."""
        return [layer.name for layer in self.layers.values() if layer.owner is module]

    def transforms(self, group: InputGroup) -> list[InputTransform]:
        """What is done to the inputs of a group: one for all its modules, and one for each call of a function."""
        layers = self.layers_of(group)
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

    def refuse_fixed(self, names: Iterable[str], what: str) -> None:
        """Raise ``UserError`` where a weight is rounded already."""
        for name in names:
            if self.by_name[name].is_fixed:
                raise UserError(
                    f"layer '{name}': its weight is rounded already and cannot be {what} any more; "
                    "steps that scale, rotate or change weights come before those that round them"
                )

    @contextmanager
    def modes(self, choose: Callable[[Quantizer], Mode]) -> Iterator[None]:
        """While open, quantizers are in the modes that ``choose`` gives them."""
        before = [(q, q.mode) for q in self.quantizers]
        for q, _ in before:
            q.mode = choose(q)
        try:
            yield
        finally:
            for q, mode in before:
                q.mode = mode

    @contextmanager
    def computing_with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While open, forwards use these weights."""
        given = {name: part.matrix for name, part in self.by_name.items()} if weights else {}
        sites = {site_of(name) for name in weights}
        for site in sites:
            layer, stack = self.layers[site], self.stacks.get(site)
            names = [site] if stack is None else [matrix.name for matrix in stack.matrices]
            parts = [weights.get(name, given[name]) for name in names]
            layer.quantizer.override = layer.quantizer.view.to_parameter(
                parts[0] if stack is None else torch.stack([part.to(layer.parameter.dtype) for part in parts])
            )
        try:
            yield
        finally:
            for site in sites:
                self.layers[site].quantizer.override = None

    @contextmanager
    def computing_rounded(self) -> Iterator[None]:
        """While open, forwards use weights as they will be: those that are not fixed yet rounded to nearest."""
        tried = [layer for layer in self.layers.values() if not layer.is_fixed]
        for layer in tried:
            stack = self.stacks.get(layer.name)
            rounded = stack.rounded() if stack is not None and stack.is_touched else layer.rounded()
            layer.quantizer.override = layer.quantizer.view.to_parameter(rounded)
        try:
            yield
        finally:
            for layer in tried:
                layer.quantizer.override = None


def _taken_apart(
    layers: Mapping[str, BlockLayer], stacks: Mapping[str, Stack]
) -> dict[str, BlockLayer | StackedMatrix]:
    parts: dict[str, BlockLayer | StackedMatrix] = {}
    for name, layer in layers.items():
        if name in stacks:
            parts |= {matrix.name: matrix for matrix in stacks[name].matrices}
        else:
            parts[name] = layer
    return parts
