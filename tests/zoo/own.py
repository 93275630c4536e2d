"""Models that people write in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.made import Case, ids


def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 7, 32)}


class Tagger(nn.Module):
    """Words to tags, by two layers of LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(24, 5)

    def forward(self, words: Tensor) -> Tensor:
        states: Tensor = self.tags(self.lstm(self.words(words))[0])
        return states


def lstm_tagger() -> Case:
    return Tagger(), {"words": ids(2, 7)}


class GraphConvolution(nn.Module):
    """``A (X W)``: a parameter that meets its input in a plain product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ torch.matmul(x, self.weight) + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(8, 16), GraphConvolution(16, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x, adjacency))
        out: Tensor = self.second(hidden, adjacency)
        return out


def gcn() -> Case:
    adjacency = torch.rand(10, 10).softmax(-1)
    return GCN(), {"x": torch.randn(10, 8), "adjacency": adjacency}


OWN = (torch_encoder, lstm_tagger, gcn)
