"""Routers and adapters: found without names, left by broad rules, quantized when a rule means them."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

import octavo
from octavo.spec.facts import Role
from octavo.spec.recipe import Recipe
from zoo.battery import outputs
from zoo.table import made

BROAD = Recipe("broad", ()).quantize("*", weight="int2-channel")


class Dispatcher(nn.Module):
    """A mixture whose router bears a name that no list knows."""

    def __init__(self) -> None:
        super().__init__()
        self.sorting_hat = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.sorting_hat(x).softmax(-1)
        return sum(shares[..., k, None] * expert(x) for k, expert in enumerate(self.experts))


def test_a_router_is_left_by_a_broad_rule() -> None:
    model, x = nn.Sequential(Dispatcher()), torch.randn(4, 8)
    plan = octavo.plan(model, BROAD, sample=x)
    router = plan.decision("0.sorting_hat")
    assert router.site.role is Role.ROUTER
    assert not router.scheme
    assert router.why.startswith("router: it decides which experts run")
    assert all(plan.decision(f"0.experts.{k}").weight for k in range(3))


def test_a_router_is_quantized_when_a_rule_names_it() -> None:
    model, x = nn.Sequential(Dispatcher()), torch.randn(4, 8)
    plan = octavo.plan(model, BROAD.quantize("*.sorting_hat", weight="int8-channel"), sample=x)
    assert str(plan.decision("0.sorting_hat").weight) == "int8-channel"


def adapted() -> tuple[Any, dict[str, Any]]:
    model, batch = made("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval(), batch


def test_adapters_stay_and_the_layers_below_are_quantized() -> None:
    model, batch = adapted()
    before = outputs(model, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    run = octavo.quantize(model, BROAD, [batch])
    by_role = [d for d in run.plan.decisions if d.site.role is Role.ADAPTER]
    assert len(by_role) == 2 * 2 * 2  # A and B of two layers in two blocks
    assert all(not d.scheme and "adapter: kept apart" in d.why for d in by_role)
    assert any(name.endswith("q_proj.base_layer.weight_quantizer") for name in run.door.quantizer_names())
    assert not torch.allclose(outputs(model, batch), before)
    octavo.strip(model)
    assert torch.equal(outputs(model, batch), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_adapters_are_quantized_when_a_rule_means_them() -> None:
    model, batch = adapted()
    plan = octavo.plan(model, BROAD.quantize("*.lora_{A,B}.*", weight="int8-channel"), sample=batch)
    adapters = [d for d in plan.decisions if d.site.role is Role.ADAPTER]
    assert {str(d.weight) for d in adapters} == {"int8-channel"}


def test_a_switched_adapter_still_switches() -> None:
    model, batch = adapted()
    run = octavo.quantize(model, BROAD, [batch])
    with_adapter = outputs(run.model, batch)
    with run.model.disable_adapter():
        assert not torch.allclose(outputs(run.model, batch), with_adapter)
    assert torch.equal(outputs(run.model, batch), with_adapter)
