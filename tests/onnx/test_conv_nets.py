"""Convolutional nets, trained on scikit-learn's digits so that accuracy means something, through both doors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.onnx.nets import NETS, NUM_TRAINED, Inverted, Net, Residual, accuracy, digits, trained, write_graph
from torch import nn

from octavo import pipeline
from octavo.onnx.fusion import fusion_of
from octavo.sources import open_model

pytestmark = pytest.mark.slow
MOST_LOST = 0.005


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> Net:
    return trained(request.param)


def test_the_quantized_file_is_as_accurate_as_the_net(net: Net, tmp_path: Path) -> None:
    images = digits()[0]
    write_graph(net, tmp_path / "net.onnx")
    reference = accuracy(tmp_path / "net.onnx")
    assert reference > 0.96
    batches = [images[i : i + 32] for i in range(0, 128, 32)]
    runs = {}
    for door, model in (("torch", copy.deepcopy(net)), ("graph", open_model(tmp_path / "net.onnx"))):
        run = runs[door] = pipeline.quantize(model, "int8", batches, target="onnxruntime-cpu")
        out = pipeline.export(run, tmp_path / door, layout="onnx", sample=images[:4])
        found = pipeline.verify(out, run, [images[NUM_TRAINED : NUM_TRAINED + 64]]).to_json_object()
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
    write_graph(net, tmp_path / "net.onnx")
    theirs = pipeline.quantize(open_model(tmp_path / "net.onnx"), "int8", [images], target=target)
    ours = pipeline.quantize(net, "int8", [images], target=target)
    assert_same(ours, theirs)
    out = pipeline.export(ours, tmp_path / "out", layout="onnx", sample=images[:4])
    found = pipeline.verify(out, ours, [images]).to_json_object()
    assert found["agrees"], found["graphs"]
