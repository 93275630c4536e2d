"""Small nets like ResNet and MobileNet, trained on scikit-learn's digits so that accuracy means something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

NUM_TRAINED = 1297
"""Of 1,797 pictures."""


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
    """A convolution, blocks, a mean over the picture and a linear layer."""

    def __init__(self, blocks: list[nn.Module], width: int, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), activation)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def resnet() -> Net:
    """Three residual blocks."""
    return Net([Residual(16, 16), Residual(16, 32, 2), Residual(32, 32)], 32, nn.ReLU())


def mobilenet() -> Net:
    """Three inverted blocks, two of them residual."""
    return Net([Inverted(16, 16), Inverted(16, 24, 2), Inverted(24, 24)], 24, nn.ReLU6())


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and labels in an order that is always the same; the first ``NUM_TRAINED`` are trained on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


NETS: dict[str, Callable[[], Net]] = {make.__name__: make for make in (resnet, mobilenet)}


def trained(name: str, epochs: int = 12) -> Net:
    """One of the nets after some epochs: half a minute on a core."""
    torch.manual_seed(0)
    net = NETS[name]()
    images, labels = (part[:NUM_TRAINED] for part in digits())
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def write_graph(net: nn.Module, path: Path) -> None:
    """The unquantized graph of a net."""
    images = digits()[0][:4]
    axes = ({0: "n"},)
    program = torch.onnx.export(net, (images,), dynamo=True, opset_version=18, dynamic_shapes=axes, verbose=False)
    assert program is not None
    program.save(path)


def accuracy(graph: Path) -> float:
    """Of onnxruntime on what was not trained on."""
    images, labels = (part[NUM_TRAINED:].numpy() for part in digits())
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return float(np.mean(session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1) == labels))
