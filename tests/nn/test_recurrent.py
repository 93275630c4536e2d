"""Recurrent layers: every matrix rounded, and the layer as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import octavo
from octavo.backends.simulate import fake_quantize, format_key
from octavo.spec.formats import FORMATS
from octavo.spec.recipe import Recipe

INT4 = Recipe("mine", ()).quantize("operation:recurrent", weight="int4-channel")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(6, 5, proj_size=3),
    "gru": lambda: nn.GRU(6, 5, bias=False),
    "rnn": lambda: nn.RNN(6, 5, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(6, 5),
    "gru cell": lambda: nn.GRUCell(6, 5),
    "rnn cell": lambda: nn.RNNCell(6, 5),
}


def result(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    while isinstance(out, tuple):
        out = out[0]
    return out


@torch.no_grad()
def rounded(layer: nn.Module) -> nn.Module:
    """The same layer with its matrices rounded by hand."""
    twin = copy.deepcopy(layer)
    for name, parameter in twin.named_parameters():
        if name.startswith("weight_"):
            scale = parameter.abs().amax(1) / 7
            parameter.copy_(fake_quantize(parameter, format_key(FORMATS["int4-channel"]), scale))
    return twin


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_every_matrix_is_rounded(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    x = torch.randn(4, 6) if "cell" in name else torch.randn(3, 4, 6)
    before, expected = result(layer, x), result(rounded(layer), x)
    model = nn.Sequential(layer)
    run = octavo.quantize(model, INT4, sample=x)
    matrices = [name for name, p in layer.named_parameters() if p.dim() == 2]
    assert len(run.door.quantizer_names()) == len(matrices)
    assert torch.equal(result(layer, x), expected)
    assert not torch.equal(expected, before)
    octavo.strip(model)
    assert torch.equal(result(layer, x), before)
    flat = vars(layer).get("_flat_weights", [])
    assert all(a is layer._parameters[b] for a, b in zip(flat, vars(layer).get("_flat_weights_names", []), strict=True))


def test_multiply_adds_count_every_step() -> None:
    x = torch.randn(3, 4, 6)
    plan = octavo.plan(nn.Sequential(nn.LSTM(6, 5)), INT4, sample=x)
    assert plan.decision("0.weight_ih_l0").site.macs == 12 * 20 * 6
    assert plan.macs_covered == 1.0


class Packs(nn.Module):
    """Reads sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
        states: Tensor = self.lstm(packed)[0].data
        return states


@torch.no_grad()
def test_packed_sequences_and_copies_are_rounded_alike() -> None:
    torch.manual_seed(0)
    model, x = Packs().eval(), torch.randn(2, 4, 6)
    expected = rounded(model.lstm)(pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True))[0].data
    run = octavo.quantize(model, INT4, sample=x)
    assert run.plan.decision("lstm.weight_ih_l0").site.macs == 6 * 20 * 6
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_a_quantized_lstm_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = LAYERS["lstm"]
    run = octavo.quantize(nn.Sequential(make()), INT4, sample=torch.randn(3, 4, 6))
    octavo.save(run, tmp_path / "run")
    again = octavo.load(tmp_path / "run", nn.Sequential(make()), sample=torch.randn(3, 4, 6))
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        assert torch.equal(again.model(x)[0], run.model(x)[0])
    assert octavo.verify(tmp_path / "run", run).agrees
