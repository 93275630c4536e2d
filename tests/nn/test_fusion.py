"""Layers that engines join share what is stored once per tensor, and the simulation knows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.nn.door import TorchDoor
from octavo.numerics.qtensor import QTensor
from octavo.numerics.snapshot import LayerSnapshot
from octavo.pipeline import quantize
from octavo.spec.recipe import load_recipe


class Attention(nn.Module):
    """Three readers of one tensor, one of another; of weights that differ in range."""

    def __init__(self, factors: Sequence[float] = (1, 2, 3, 4)) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        with torch.no_grad():
            for factor, layer in zip(factors, (self.q, self.k, self.v, self.o), strict=True):
                layer.weight.mul_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        return self.o(weights @ self.v(x))


def layers_of(
    recipe: str, *leave: str, factors: Sequence[float] = (1, 2, 3, 4)
) -> tuple[dict[str, LayerSnapshot], TorchDoor, tuple[str, ...]]:
    torch.manual_seed(0)
    rules = load_recipe(recipe)
    for pattern in leave:
        rules = rules.leave(pattern, why="")
    run = quantize(Attention(factors), rules, [torch.randn(2, 5, 32)])
    return {layer.name: layer for layer in run.door.snapshot().layers()}, run.door, run.record.warnings


def outer(layer: LayerSnapshot) -> float:
    assert layer.weight is not None
    assert isinstance(layer.weight.scale, QTensor)
    assert isinstance(layer.weight.scale.scale, torch.Tensor)
    return float(layer.weight.scale.scale)


def test_readers_of_one_tensor_share_the_scale_of_their_scales() -> None:
    layers, door, warnings = layers_of("nvfp4")
    largest = max(float(getattr(door.model, name).weight.detach().abs().max()) for name in "qkv")
    expected = torch.tensor(largest) / 2688
    assert {outer(layers[name]) for name in "qkv"} == {expected.item()}
    assert outer(layers["o"]) > expected
    assert (
        len({float(layers[name].activations[slot].scale) for name in "qkv" for slot in layers[name].activations}) == 1
    )  # type: ignore[arg-type]
    assert "layers that read the same tensor (q, k, v) share the scale of their weights' scales" in warnings[-1]


def test_what_is_left_out_has_no_say() -> None:
    layers, door, _ = layers_of("nvfp4-weight-only", "v")
    largest = float(door.model.k.weight.detach().abs().max())  # type: ignore[union-attr]
    assert outer(layers["q"]) == outer(layers["k"]) == (torch.tensor(largest) / 2688).item()


def test_formats_without_a_scale_per_tensor_share_nothing() -> None:
    layers, _, warnings = layers_of("int4-group32")
    scales = [layers[name].weight.scale for name in "qk"]  # type: ignore[union-attr]
    assert not torch.equal(scales[0], scales[1])  # type: ignore[arg-type]
    assert not any("share" in warning for warning in warnings)


@pytest.mark.parametrize("step", ["scale_search", "gptq", "hqq", "awq", "svdquant"])
def test_algorithms_share_it_too(step: str, tmp_path: Path) -> None:
    recipe = {
        "rules": [{"select": "operation:linear", "scheme": {"weight": "nvfp4", "input": "nvfp4"}}],
        "steps": [step],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "x", **recipe}))
    for factors in ((1, 2, 3, 4), (3.7, 1, 2, 4)):  # the largest is rounded last, or first
        layers, _, _ = layers_of(str(tmp_path / "recipe.yaml"), factors=factors)
        assert len({outer(layers[name]) for name in "qkv"}) == 1
