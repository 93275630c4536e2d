"""Tied weights and shared modules: rounded once, the same everywhere, still tied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.nn.door import weight_quantizers
from octavo.spec.recipe import Recipe
from zoo.battery import outputs
from zoo.table import made

INT4 = Recipe("mine", ()).quantize("*", weight="int4-channel")


@pytest.mark.parametrize(
    ("name", "owner", "other"),
    [
        ("llama", "model.embed_tokens", "lm_head"),
        ("t5", "shared", "decoder.embed_tokens"),
        ("bart", "model.shared", "lm_head"),
    ],
)
def test_a_tied_weight_is_rounded_once_and_still_tied(name: str, owner: str, other: str) -> None:
    model, batch = made(name)
    run = octavo.quantize(model, INT4, [batch])
    first, second = model.get_submodule(owner), model.get_submodule(other)
    assert first._parameters["weight"] is second._parameters["weight"]
    tied = first._parameters["weight"]
    assert len([parameter for _, parameter in weight_quantizers(model) if parameter is tied]) == 1
    twin = copy.deepcopy(model)
    assert twin.get_submodule(owner)._parameters["weight"] is twin.get_submodule(other)._parameters["weight"]
    assert torch.equal(outputs(twin, batch), outputs(model, batch))
    before = outputs(model, batch)
    with run.door.disabled(lambda quantizer: True):
        assert not torch.equal(outputs(model, batch), before)


class Twice(nn.Module):
    """One layer under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


@torch.no_grad()
def test_a_shared_module_is_quantized_once_and_counts_both_calls() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 8)
    before = model(x)
    run = octavo.quantize(model, INT4, [x])
    assert run.door.quantizer_names() == ["first.weight_quantizer"]
    assert run.plan.decision("first").site.macs == 2 * 3 * 8 * 8
    assert model.first is model.second
    weight = model.first.weight_quantizer(model.first.weight)
    once = torch.relu(torch.nn.functional.linear(x, weight, model.first.bias))
    assert torch.equal(model(x), torch.nn.functional.linear(once, weight, model.first.bias))
    octavo.strip(model)
    assert torch.equal(model(x), before)
