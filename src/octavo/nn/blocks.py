"""Blocks of a torch model: the repeating parts, as algorithms see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.nn.layers import layer_kind
from octavo.nn.quantizer import ActivationQuantizer, WeightQuantizer
from octavo.numerics.observers import Observer


class TorchBlock:
    """``numerics.door.Block`` for one module of a torch model."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    def _path(self, layer: str) -> str:
        return layer.removeprefix(self.name).lstrip(".")

    def _full(self, path: str) -> str:
        return ".".join(part for part in (self.name, path) if part)

    def layers(self) -> Sequence[str]:
        """Layers with a weight quantizer of their own."""
        return [
            self._full(path)
            for path, module in self.module.named_modules()
            if any(isinstance(child, WeightQuantizer) for child in module.children()) and "weight" in module._parameters
        ]

    def _weight(self, layer: str) -> tuple[nn.Module, Tensor]:
        module = self.module.get_submodule(self._path(layer))
        return module, module.get_parameter("weight")

    def read_weight(self, layer: str) -> Tensor:
        """See ``Block.read_weight``."""
        module, weight = self._weight(layer)
        kind = layer_kind(module)
        assert kind is not None
        return kind.view(weight).to_matrix(weight.detach())

    @torch.no_grad()
    def write_weight(self, layer: str, value: Tensor) -> None:
        """See ``Block.write_weight``."""
        module, weight = self._weight(layer)
        kind = layer_kind(module)
        assert kind is not None
        weight.copy_(kind.view(weight).to_parameter(value))

    def observers(self) -> Mapping[str, Observer]:
        """See ``Block.observers``."""
        return {
            q.name: q.observer
            for q in self.module.modules()
            if isinstance(q, ActivationQuantizer) and q.observer is not None
        }

    def groups(self) -> Sequence[Sequence[str]]:
        """See ``Block.groups``."""
        readers: dict[int, list[str]] = {}
        for q in self.module.modules():
            if isinstance(q, ActivationQuantizer) and q.shared is not None:
                readers.setdefault(id(q.shared), []).append(q.name.rpartition(".")[0])
        return list(readers.values())

    def run(self, inputs: Any) -> Any:
        """See ``Block.run``."""
        args, kwargs = inputs
        return self.module(*args, **kwargs)


def find_blocks(model: nn.Module) -> Iterator[TorchBlock]:
    """Members of every ``nn.ModuleList`` whose members are of one class; the whole model where there is none."""
    found = False
    inside: list[str] = []
    for path, module in model.named_modules():
        members = list(module.children())
        repeats = isinstance(module, nn.ModuleList) and len(members) > 1 and len({type(m) for m in members}) == 1
        if repeats and not any(path.startswith(f"{outer}.") for outer in inside):
            found = True
            inside.append(path)
            for name, member in module.named_children():
                yield TorchBlock(f"{path}.{name}", member)
    if not found:
        yield TorchBlock("", model)
