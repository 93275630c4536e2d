"""Batch norms become part of the layer before them; what that layer is, and whether it may, the data flow says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import octavo
from octavo import pipeline
from octavo.numerics.arrays import tensor_of
from octavo.readers.opening import open_checkpoint
from zoo.battery import anatomy, bits, same_bits

WEIGHTS = "int8-weight-only"


def _norm(kind: type[nn.Module], width: int, **options: bool) -> nn.Module:
    norm = kind(width, **options)
    for name, tensor in norm.named_buffers():
        if name != "num_batches_tracked":
            tensor.copy_(torch.rand(width) + 0.5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def _images(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*layers), torch.randn(3, 4, 6, 6)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv": lambda: _images(nn.Conv2d(4, 6, 3, bias=False), _norm(nn.BatchNorm2d, 6), nn.ReLU()),
    "conv in groups, with a bias": lambda: _images(nn.Conv2d(4, 6, 3, groups=2), _norm(nn.BatchNorm2d, 6)),
    "no factors": lambda: _images(nn.Conv2d(4, 6, 3), _norm(nn.BatchNorm2d, 6, affine=False)),
    "synchronized": lambda: _images(nn.Conv2d(4, 6, 3), _norm(nn.SyncBatchNorm, 6)),
    "transposed in groups": lambda: _images(
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), _norm(nn.BatchNorm2d, 6)
    ),
    "one axis": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3), _norm(nn.BatchNorm1d, 6)), torch.randn(3, 4, 8)),
    "linear": lambda: (nn.Sequential(nn.Linear(4, 6, bias=False), _norm(nn.BatchNorm1d, 6)), torch.randn(9, 4)),
    "weight norm": lambda: _images(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), _norm(nn.BatchNorm2d, 6)),
}


def _made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = CASES[name]()
    return model.eval(), x


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_folded_norm_keeps_the_function_and_comes_back_bit_for_bit(name: str) -> None:
    model, x = _made(name)
    expected, before, looks = model(x), bits(model), anatomy(model)
    run = pipeline.quantize(model, WEIGHTS, sample=x)
    assert [d.folded_into for d in run.plan.decisions if d.folded_into] == ["0"]
    with run.door.disabled(lambda quantizer: True):
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    quantized = model(x)
    assert not torch.equal(quantized, expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), quantized)
    for stripped in (twin, model):
        octavo.strip(stripped)
        assert anatomy(stripped) == looks
        assert all(torch.equal(tensor, before[key][1]) for key, tensor in stripped.state_dict().items())
        assert torch.equal(stripped(x), expected)
    assert same_bits(before, bits(model))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_runs_have_folded_norms_and_are_right_for_the_models_own_classes(name: str, tmp_path: Path) -> None:
    model, x = _made(name)
    run = pipeline.quantize(model, WEIGHTS, sample=x)
    quantized = model(x)
    pipeline.save(run, tmp_path / "run")
    loaded = pipeline.load(tmp_path / "run", _made(name)[0], sample=x)
    assert torch.equal(loaded.model(x), quantized)
    assert pipeline.verify(tmp_path / "run", run, [x]).agrees
    octavo.strip(loaded.model)
    assert torch.allclose(loaded.model(x), quantized, rtol=1e-5, atol=1e-5)
    if name != "weight norm":  # of which files have the weight itself
        files = open_checkpoint(tmp_path / "run")
        tensors = {key: torch.from_numpy(entry.dequantize()) for key, entry in files.weights.items()}
        plain, _ = _made(name)
        plain.load_state_dict(tensors | {key: tensor_of(t.read()) for key, t in files.tensors.items()})
        assert torch.allclose(plain(x), quantized, rtol=1e-5, atol=1e-5)


class Read(nn.Module):
    """A convolution that somebody else reads, too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(4, 4, 1), _norm(nn.BatchNorm2d, 4), way

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.conv(x)
        match self.way:
            case "sum":
                return self.norm(hidden) + hidden
            case "returned":
                return self.norm(hidden), hidden
            case "changed":
                return self.norm(hidden.relu_())
            case "twice":
                return self.norm(hidden) + self.conv(x)
            case _:
                return self.norm(x)


class OwnBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class Axes(nn.Module):
    """Channels of the norm are not those of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), _norm(nn.BatchNorm1d, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def _shared() -> tuple[nn.Module, Tensor]:
    model, x = _images(nn.Conv2d(4, 4, 1), _norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    return model, x


def _hooked() -> tuple[nn.Module, Tensor]:
    model, x = _images(nn.Conv2d(4, 4, 1), _norm(nn.BatchNorm2d, 4))
    model[0].register_forward_hook(lambda *inputs: None)
    return model, x


LEFT: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str]] = {
    **{
        way: (lambda way=way: (Read(way), torch.randn(2, 4, 5, 5)), "read by something else")
        for way in ("sum", "returned", "twice")
    },
    "changed": (lambda: (Read("changed"), torch.randn(2, 4, 5, 5)), "does not follow"),
    "of the input": (lambda: (Read(""), torch.randn(2, 4, 5, 5)), "does not follow"),
    "own forward": (lambda: _images(nn.Conv2d(4, 4, 1), OwnBatchNorm2d(4)), "forward of its own"),
    "other axes": (lambda: (Axes(), torch.randn(2, 4, 4)), "channels are not"),
    "of the batch": (lambda: _images(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "statistics"),
    "no bias": (lambda: _images(nn.Conv2d(4, 4, 1, bias=False), _norm(nn.BatchNorm2d, 4, affine=False)), "a bias"),
    "shared": (_shared, "shared"),
    "hooked": (_hooked, "hooks"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_that_cannot_be_folded_stays_and_the_plan_says_why(name: str) -> None:
    torch.manual_seed(0)
    make, why = LEFT[name]
    model, x = make()
    plan = pipeline.plan(model.eval(), "int8", sample=x)
    found = [decision for decision in plan.decisions if decision.site.operation == "norm"]
    assert [(decision.folded_into, why in decision.why) for decision in found] == [("", True)], found[0].why


def test_without_a_sample_nothing_is_folded() -> None:
    model, _ = _made("conv")
    assert "without a sample" in pipeline.plan(model, WEIGHTS).decision("1").why
