"""Biases as algorithms change and add them in a torch model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import UserError
from octavo.spec.steps import make_step


class Model(nn.Module):
    """A convolution with a bias, and linear layers with and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.conv(x).flatten(2).mT)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return Model()


DATA = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3)) + 1 for _ in range(2)]


def recipe(**options: bool) -> octavo.Recipe:
    plain = octavo.Recipe("mine", ()).quantize("operation:linear", "operation:conv", weight="int4-channel")
    return plain.with_steps(make_step("bias_correction", options))


def mean_error(model: nn.Module, reference: nn.Module) -> float:
    """Of the first layer's output, whose input is exact."""
    with torch.no_grad():
        return float((model.conv(DATA[0]) - reference.conv(DATA[0])).mean((0, 2, 3)).abs().max())


def test_the_mean_of_every_output_of_a_convolution_is_what_it_was(model: nn.Module) -> None:
    reference = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    octavo.quantize(plain, recipe().with_steps(), DATA[:1])
    run = octavo.quantize(model, recipe(), DATA[:1])
    assert mean_error(model, reference) < 1e-5 < 0.01 < mean_error(plain, reference)
    assert any("'down'" in warning and "has no bias" in warning for warning in run.record.warnings)


class Depthwise(nn.Module):
    """Convolutions of a mobile network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3, padding=1, groups=3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_kernels_in_groups_have_means_of_their_own() -> None:
    torch.manual_seed(0)
    model, data = Depthwise(), [torch.randn(4, 6, 9, 9) + torch.arange(6.0).view(1, 6, 1, 1)]
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    octavo.quantize(plain, octavo.Recipe("mine", ()).quantize("operation:conv", weight="int4-channel"), data)
    corrected = (
        octavo.Recipe("mine", ()).quantize("operation:conv", weight="int4-channel").with_steps("bias_correction")
    )
    octavo.quantize(model, corrected, data)
    with torch.no_grad():
        wanted = reference(data[0]).mean((0, 2, 3))
        assert (model(data[0]).mean((0, 2, 3)) - wanted).abs().max() < 1e-5
        assert (plain(data[0]).mean((0, 2, 3)) - wanted).abs().max() > 0.01


def test_a_bias_that_was_added_is_stored_verified_and_taken_away_again(model: nn.Module, tmp_path) -> None:
    reference = copy.deepcopy(model)
    run = octavo.quantize(model, recipe(add=True), DATA, keep_original=True)
    assert model.down.bias is not None
    octavo.save(run, tmp_path / "run")
    again = octavo.load(tmp_path / "run", Model(), sample=DATA[0])
    assert torch.equal(again.model(DATA[0]), model(DATA[0]))
    assert octavo.verify(tmp_path / "run", run, DATA).agrees
    octavo.strip(model)
    assert model.down.bias is None
    assert torch.equal(model(DATA[0]), reference(DATA[0]))


def test_an_added_bias_is_refused_where_no_engine_would_add_it(model: nn.Module) -> None:
    fp8 = octavo.Recipe("mine", ()).quantize("operation:linear", weight="e4m3-tensor", input="e4m3-tensor")
    with pytest.raises(UserError, match="may give biases to layers whose model has none"):
        octavo.quantize(model, fp8.with_steps(make_step("bias_correction", {"add": True})), DATA, layouts=["modelopt"])
