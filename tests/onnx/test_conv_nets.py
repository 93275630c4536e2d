"""Convolutional nets, trained on scikit-learn's digits so that accuracy means something, through both doors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from octavo import pipeline
from octavo.onnx.fusion import fusion_of
from octavo.sources import open_model

pytestmark = pytest.mark.slow
MOST_LOST = 0.005


class Residual(nn.Module):
    """As in ResNet: two convolutions beside a shortcut."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = shortcut if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class Inverted(nn.Module):
    """As in MobileNet V2: a wide convolution channel by channel between two narrow ones."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        wide = 4 * width
        self.is_residual = stride == 1 and width == out
        self.body = nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.body(x) if self.is_residual else self.body(x)
        return out


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module], width: int, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), activation)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def resnet() -> Net:
    return Net([Residual(16, 16), Residual(16, 32, 2), Residual(32, 32)], 32, nn.ReLU())


def mobilenet() -> Net:
    return Net([Inverted(16, 16), Inverted(16, 24, 2), Inverted(24, 24)], 24, nn.ReLU6())


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


@pytest.fixture(scope="module", params=[resnet, mobilenet])
def trained(request: pytest.FixtureRequest) -> Net:
    torch.manual_seed(0)
    net: Net = request.param()
    images, labels = (part[:1297] for part in digits())
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(12):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def accuracy(graph: Path) -> float:
    """Of onnxruntime on what was not trained on."""
    images, labels = (part[1297:].numpy() for part in digits())
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return float(np.mean(session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1) == labels))


def test_the_quantized_file_is_as_accurate_as_the_net(trained: Net, tmp_path: Path) -> None:
    images = digits()[0]
    program = torch.onnx.export(trained, (images[:4],), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(tmp_path / "net.onnx")
    reference = accuracy(tmp_path / "net.onnx")
    assert reference > 0.96
    batches = [images[i : i + 32] for i in range(0, 128, 32)]
    runs = {}
    for door, model in (("torch", copy.deepcopy(trained)), ("graph", open_model(tmp_path / "net.onnx"))):
        run = runs[door] = pipeline.quantize(model, "int8", batches, target="onnxruntime-cpu")
        out = pipeline.export(run, tmp_path / door, layout="onnx", sample=images[:4])
        found = pipeline.verify(out, run, [images[1297:1361]]).to_json_object()
        assert found["agrees"], found["graphs"]
        assert accuracy(out / "model.onnx") >= reference - MOST_LOST
        fusion = fusion_of(out / "model.onnx")
        assert fusion.unfused == ()  # all of it in integers
        assert not fusion.kernels.keys() & {"Add", "Relu", "Clip", "Conv", "BatchNormalization"}
        assert fusion.kernels["QLinearAdd"] == sum(site.operation == "add" for site in run.plan.facts.sites)
    assert_same(runs["torch"], runs["graph"])


def assert_same(ours: pipeline.Run, theirs: pipeline.Run) -> None:
    """Equal quantizers, weight codes and scales; ranges but for the last places of two runtimes' sums."""
    assert dict(ours.plan.quantizers()) == dict(theirs.plan.quantizers())
    twins = {layer.name: layer for layer in theirs.door.snapshot().layers()}
    for layer in ours.door.snapshot().layers():
        twin = twins.pop(layer.name)
        assert (layer.weight is None) == (twin.weight is None)
        if layer.weight is not None and twin.weight is not None:
            assert torch.equal(layer.weight.codes, twin.weight.codes)
            assert torch.equal(layer.weight.scale, twin.weight.scale)  # type: ignore[arg-type]
        assert layer.activations.keys() == twin.activations.keys()
        for slot, found in layer.activations.items():
            other = twin.activations[slot]
            torch.testing.assert_close(found.scale, other.scale, rtol=1e-5, atol=0)
            assert found.zero_point == other.zero_point
    assert not twins


class Shared(Residual):
    """As in torchvision: one ReLU module, in place, for all activations, and sums in place."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__(width, out, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        result: torch.Tensor = self.relu(out)
        return result


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_both_doors_quantize_the_same_places_whatever_the_spelling(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Shared(16, 16), Inverted(16, 16), Shared(16, 24, 2)], 24, nn.ReLU(inplace=True))
    images = digits()[0][:64]
    for _ in range(3):
        net(images)  # norms know what passes
    net.eval()
    program = torch.onnx.export(net, (images[:4],), dynamo=True, opset_version=18, dynamic_shapes=({0: "n"},))
    assert program is not None
    program.save(tmp_path / "net.onnx")
    theirs = pipeline.quantize(open_model(tmp_path / "net.onnx"), "int8", [images], target=target)
    ours = pipeline.quantize(net, "int8", [images], target=target)
    assert_same(ours, theirs)
    out = pipeline.export(ours, tmp_path / "out", layout="onnx", sample=images[:4])
    found = pipeline.verify(out, ours, [images]).to_json_object()
    assert found["agrees"], found["graphs"]
