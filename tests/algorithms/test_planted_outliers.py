"""What SmoothQuant is for: a few channels far larger than the rest, and one scale for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import octavo
from algorithms.outliers import plant


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, width: int = 200, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batches(seed: int, width: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 24, width, generator=generator) for _ in range(3)]


def lost(model: nn.Module, recipe: octavo.Recipe, reference: nn.Module, width: int = 200) -> float:
    """Mean cosine to the unquantized outputs that is missing from 1."""
    octavo.quantize(model, recipe, batches(1, width))
    with torch.no_grad():
        pairs = [(model(x).flatten(0, 1), reference(x).flatten(0, 1)) for x in batches(2, width)]
    return 1 - float(torch.cat([nn.functional.cosine_similarity(a.double(), b.double()) for a, b in pairs]).mean())


def with_outliers(model: nn.Module) -> nn.Module:
    """The same function."""
    plain = copy.deepcopy(model)
    plant((layer.norm1, (layer.q, layer.k, layer.v)) for layer in model.layers)
    plant((layer.norm2, (layer.gate, layer.up)) for layer in model.layers)
    x = batches(0, model.layers[0].q.in_features)[0]
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    return model


@pytest.fixture(scope="module")
def planted() -> nn.Module:
    return with_outliers(Model())


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothing_leaves_a_tenth_of_the_loss(planted, alpha):
    recipe = octavo.load_recipe("int8")
    plain = lost(copy.deepcopy(planted), recipe, planted)
    smooth = lost(
        copy.deepcopy(planted), recipe.with_steps(octavo.spec.steps.make_step("smoothquant", {"alpha": alpha})), planted
    )
    assert plain > 1e-3
    assert smooth <= 0.1 * plain


@pytest.mark.parametrize("preset", ["best:int8", "best:nvfp4", "best:mxfp4"])
def test_own_choices_lose_hardly_more_where_there_are_outliers(preset):
    """Rounding to nearest loses three times as much or more."""
    reference, recipe = Model(256), octavo.load_recipe(preset)
    plain = octavo.load_recipe(preset.removeprefix("best:"))
    without, with_them, nearest = (
        lost(made(copy.deepcopy(reference)), chosen, reference, 256)
        for made, chosen in ((nn.Module.eval, recipe), (with_outliers, recipe), (with_outliers, plain))
    )
    assert with_them < 1.1 * without
    assert nearest > 3 * with_them
