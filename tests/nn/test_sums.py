"""Residual sums, and outputs of convolutions behind the activation that alone reads them, in every spelling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo
from octavo import pipeline
from octavo.errors import UserError
from octavo.nn.door import TorchDoor
from octavo.pipeline import Run
from octavo.spec.facts import Slot
from octavo.spec.recipe import load_recipe

X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))
TARGET = "onnxruntime-cpu"


class Block(nn.Module):
    """Two convolutions beside nothing; the spelling is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)


class Operator(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(F.relu(self.first(x))))


class Shared(Block):
    """As in torchvision: one module for all activations, sums in place."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.first(x))
        out = self.second(out)
        out += identity
        return self.relu(out)


class Function(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).clamp(0, 6)
        return F.relu(torch.add(self.second(hidden), x), inplace=True)


class Method(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.first(x))
        return self.relu(self.second(hidden).add(other=x))


class Helped(Block):
    """The sum is in a function that the forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self._joined(self.second(torch.relu(self.first(x))), x)

    def _joined(self, left: Tensor, right: Tensor) -> Tensor:
        return _summed(left, right).relu()


def _summed(left: Tensor, right: Tensor) -> Tensor:
    return left + right


SPELLINGS: list[type[Block]] = [Operator, Shared, Function, Method, Helped]


def _net(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    return nn.Sequential(stem, kind(), nn.Flatten(), nn.Linear(144, 5)).eval()


@pytest.fixture(params=SPELLINGS)
def kind(request: pytest.FixtureRequest) -> type[Block]:
    found: type[Block] = request.param
    return found


@torch.no_grad()
def test_every_spelling_is_one_sum_of_what_convolutions_give(kind: type[Block]) -> None:
    run = pipeline.quantize(_net(kind), "int8", [X], target=TARGET)
    (found,) = (decision for decision in run.plan.decisions if decision.site.operation == "add")
    assert found.site.name == "1#add0"
    assert found.site.adds == ("1.second", "0.0")
    assert set(found.scheme) == {Slot.LEFT, Slot.RIGHT, Slot.OUTPUT}
    assert not any("stays off" in warning for warning in run.record.warnings)


@torch.no_grad()
def test_outputs_are_rounded_behind_the_activation_that_alone_reads_them(kind: type[Block]) -> None:
    """So the range of none of them reaches below 0."""
    run = pipeline.quantize(_net(kind), "int8", [X], target=TARGET)
    outputs = {
        layer.name: layer.activations[Slot.OUTPUT]
        for layer in run.door.snapshot().layers()
        if Slot.OUTPUT in layer.activations
    }
    lowest = {name: int(found.zero_point) == -128 for name, found in outputs.items()}  # type: ignore[arg-type]
    assert lowest == {"0.0": True, "1.first": True, "1.second": False, "1#add0": True}


@torch.no_grad()
def test_each_quantizer_of_a_sum_alone_changes_the_outputs(kind: type[Block]) -> None:
    model = _net(kind)
    expected = model(X)
    run = pipeline.quantize(model, "int8", [X], target=TARGET)
    names = [name for name in run.door.quantizer_names() if name.endswith(("output_quantizer", "t_quantizer"))]
    assert len([name for name in names if "#add0" in name]) == 3
    for name in names:
        with run.door.disabled(lambda other, name=name: other != name):  # type: ignore[misc]
            assert not torch.equal(model(X), expected), name
    with run.door.disabled(lambda other: True):
        assert torch.equal(model(X), expected)


@torch.no_grad()
def test_runs_copies_compiled_models_and_stripped_ones_compute_the_same(kind: type[Block], tmp_path: Path) -> None:
    model = _net(kind)
    expected, inside = model(X), {path: type(module) for path, module in model.named_modules()}
    run = pipeline.quantize(model, "int8", [X], target=TARGET)
    quantized = model(X)
    pipeline.save(run, tmp_path / "run")
    loaded = pipeline.load(tmp_path / "run", _net(kind))  # with a sample of the shapes that the run kept
    assert torch.equal(loaded.model(X), quantized)
    assert torch.equal(copy.deepcopy(model)(X), quantized)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), quantized)
    octavo.strip(model)
    assert torch.equal(model(X), expected)
    assert {path: type(module) for path, module in model.named_modules()} == inside
    (tmp_path / "run" / "sample.json").unlink()
    with pytest.raises(UserError, match="give a sample"):
        pipeline.load(tmp_path / "run", _net(kind))


def test_tensorrt_rounds_what_skips_the_convolution(kind: type[Block]) -> None:
    plan = pipeline.plan(_net(kind), "int8", sample=X, target="tensorrt")
    assert set(plan.decision("1#add0").scheme) == {Slot.RIGHT}
    assert not pipeline.plan(_net(kind), "int8", sample=X).decision("1#add0").scheme


class Loop(Block):
    """One expression sums twice, and one activation is behind both convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + torch.relu(layer(x))
        return x


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out.add_(x)
        return out


class Read(Block):
    """What goes into the activation is read elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.relu(hidden)) + hidden


def _site(kind: type[Block]) -> Run:
    return pipeline.quantize(_net(kind), "int8", [X], target=TARGET)


def test_a_sum_that_has_no_place_of_its_own_stays_and_the_plan_says_why() -> None:
    for kind, why in ((Loop, "several sums"), (InPlace, "in place")):
        decision = _site(kind).plan.decision("1#add0")
        assert not decision.scheme
        assert why in decision.why


def test_an_output_stays_in_front_of_an_activation_that_is_not_alone_or_not_its_own() -> None:
    assert {d.site.activation for d in _site(Read).plan.decisions} == {"0.1#forward", ""}
    assert {d.site.activation for d in _site(Loop).plan.decisions} == {"0.1#forward", ""}


@torch.no_grad()
def test_an_activation_that_a_rule_rounds_too_is_rounded_twice() -> None:
    model = _net(Operator)
    recipe = load_recipe("int8").quantize("operation:activation", output="int8-tensor")
    door = TorchDoor(model, sample=X)
    assert "0.1" in {site.name for site in door.facts().sites}
    run = pipeline.quantize(model, recipe, [X], target=TARGET)
    names = set(run.door.quantizer_names())
    assert {"0.0.output_quantizer", "0.1.output_quantizer"} <= names
    for name in ("0.0.output_quantizer", "0.1.output_quantizer"):
        with run.door.disabled(lambda other, name=name: other != name):  # type: ignore[misc]
            assert not torch.equal(model(X), _net(Operator)(X))
