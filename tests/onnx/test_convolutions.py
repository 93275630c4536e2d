"""Algorithms on convolutions of a graph: rows, factors and biases as in a torch model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo import pipeline
from octavo.numerics.windows import Geometry, windows
from octavo.sources import open_model
from octavo.spec.recipe import read_recipe

X = torch.rand(32, 3, 9, 9, generator=torch.Generator().manual_seed(1))
RECIPE = """
name: coarse
rules: [{{select: ["{which}"], scheme: {{weight: {weight}}}}}]
steps: [{step}]
"""


class Chain(nn.Module):
    """Convolutions in a row whose channels differ much in size, as a folded norm leaves them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 1)
        sizes = torch.logspace(-1.5, 1.5, 16)[torch.randperm(16)]
        with torch.no_grad():
            self.first.weight.mul_(sizes.view(-1, 1, 1, 1))
            self.first.bias.mul_(sizes)  # type: ignore[union-attr]
            self.second.weight.div_(sizes.view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("graphs") / "chain.onnx"
    program = torch.onnx.export(Chain().eval(), (X,), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(path)
    return path


def quantized(file: Path, weight: str, step: str, which: str = "operation:conv") -> pipeline.Run:
    recipe = read_recipe(RECIPE.format(weight=weight, step=step, which=which), "coarse.yaml")
    return pipeline.quantize(open_model(file), recipe, [X[:16], X[16:]])


@torch.no_grad()
def error(run: pipeline.Run) -> torch.Tensor:
    """What the simulation's output is off."""
    difference: torch.Tensor = next(iter(run.model(X).values())) - Chain().eval()(X)
    return difference


def test_windows_are_those_of_a_convolution() -> None:
    x, weight = torch.randn(2, 6, 8, 7), torch.randn(4, 6, 3, 2)
    seen = windows(x, (3, 2), Geometry(((1, 1), (2, 2)), (2, 1), (1, 2)))
    own = torch.einsum("nchwij,ocij->nohw", seen, weight)
    assert torch.allclose(own, F.conv2d(x, weight, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), atol=1e-4)


def test_equalization_moves_sizes_between_convolutions_and_keeps_the_function(file: Path) -> None:
    plain, equalized = quantized(file, "int8-tensor", ""), quantized(file, "int8-tensor", "equalize")
    assert error(equalized).norm() < 0.3 * error(plain).norm()
    with equalized.door.disabled(lambda name: True):
        assert error(equalized).abs().max() < 1e-4


def test_bias_correction_takes_out_what_rounding_adds_to_means(file: Path) -> None:
    runs = [quantized(file, "int4-channel", step, "third") for step in ("", "bias_correction")]
    means = [error(run).mean((0, 2, 3)).abs().max() for run in runs]
    assert means[0] > 1e-3
    assert means[1] < 1e-5


@pytest.mark.parametrize("step", ["gptq", "scale_search: {measure: gram}"])
def test_rounding_by_the_gram_matrix_beats_rounding_to_nearest(file: Path, step: str) -> None:
    assert error(quantized(file, "int4-channel", step)).norm() < error(quantized(file, "int4-channel", "")).norm()


def test_both_doors_learn_the_same_from_convolutions(file: Path) -> None:
    recipe = read_recipe(RECIPE.format(weight="int4-channel", step="gptq", which="operation:conv"), "coarse.yaml")
    runs = [pipeline.quantize(model, recipe, [X]) for model in (Chain().eval(), open_model(file))]
    ours, theirs = ({layer.name: layer.weight for layer in run.door.snapshot().layers()} for run in runs)
    for name, weight in ours.items():
        twin = theirs[name]
        assert weight is not None
        assert twin is not None
        assert (weight.codes == twin.codes).float().mean() > 0.99
