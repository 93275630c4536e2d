"""Computed weights: weight norm and spectral norm, old and new, and parametrizations of a user's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import octavo
from octavo.backends.simulate import fake_quantize, format_key
from octavo.spec.formats import FORMATS
from octavo.spec.recipe import Recipe
from zoo.battery import anatomy, bits, same_bits

INT4 = Recipe("mine", ()).quantize("operation:*", weight="int4-channel")


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


def own() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def old(function: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return function(nn.Linear(6, 5))

    return make


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv1d(6, 4, 3, padding=1), dim=2),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
    "own": own,
    "old weight norm": old(weight_norm),
    "old spectral norm": old(spectral_norm),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name](), nn.ReLU()).eval()
    x = torch.randn(2, 6, 8) if "Conv" in type(model[0]).__name__ else torch.randn(3, 6)
    model(x)
    return model, x


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_computed_weight_is_rounded_and_comes_back(name: str) -> None:
    model, x = made(name)
    before, shape, tensors = model(x), anatomy(model), bits(model)
    count = sum(p.numel() for p in model.parameters())
    weight = model[0].weight.detach().clone()
    run = octavo.quantize(model, INT4, sample=x)
    assert run.door.quantizer_names() == ["0.weight_quantizer"]
    matrix = weight.flatten(1)
    expected = fake_quantize(matrix, format_key(FORMATS["int4-channel"]), matrix.abs().amax(1) / 7).reshape(
        weight.shape
    )
    twin = nn.Conv1d(6, 4, 3, padding=1) if weight.dim() == 3 else nn.Linear(*reversed(weight.shape))
    twin.weight.copy_(expected)
    twin.bias.copy_(model[0].bias)
    assert torch.equal(model(x), torch.relu(twin(x)))
    assert sum(row.num_parameters for row in run.plan.coverage()) == count
    octavo.strip(model)
    assert torch.equal(model(x), before)
    assert anatomy(model) == shape
    assert same_bits(tensors, bits(model))
    assert torch.equal(copy.deepcopy(model)(x), before)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_saved_as_a_plain_weight(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    run = octavo.quantize(model, INT4, sample=x)
    stored = {key for key, _ in run.door.snapshot().passthrough()}
    assert stored <= {"0.bias", "0.weight_u", "0.weight_v"}  # old spectral norm keeps its vectors
    octavo.save(run, tmp_path / "run")
    again = octavo.load(tmp_path / "run", made(name)[0], sample=x)
    assert torch.equal(again.model(x), run.model(x))
    assert octavo.verify(tmp_path / "run", run).agrees


def test_what_it_was_computed_from_moves_with_the_model() -> None:
    model, x = made("weight norm")
    octavo.quantize(model, INT4, sample=x)
    model.double()
    octavo.strip(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_several_computed_parameters_are_left_with_the_reason() -> None:
    model, x = made("own")
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    plan = octavo.plan(nn.Sequential(model, nn.Linear(6, 2)), INT4, sample=x)
    assert plan.decision("0.0").why.startswith("several of its parameters are computed")
