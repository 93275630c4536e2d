"""Experts: counted while calibrating, and the policies for those that few tokens reach."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.errors import UserError
from octavo.nn.experts import find_experts
from octavo.spec.experts import ExpertsPolicy
from octavo.spec.plan import Plan
from octavo.spec.recipe import Recipe, load_recipe, read_recipe
from octavo.spec.steps import make_step
from zoo.battery import outputs
from zoo.table import made


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


class Mixture(nn.Module):
    """A list of experts, of which the last only sees tokens whose first channel is large."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[..., 0] > 0).long() + (x[..., 0] > 10).long()
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            y[chosen == k] = expert(x[chosen == k])
        return y


def mixture(outlier: float = 0.5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 8)
    x[0, 0, 0] = outlier
    return nn.Sequential(Mixture()).eval(), x


def recipe(rare: str, tokens: int = 4) -> Recipe:
    return load_recipe("fp8").with_calibration(experts=ExpertsPolicy.of(rare, tokens))


def scale(run: octavo.Run, expert: int) -> float:
    return float(run.model.get_submodule(f"0.experts.{expert}.up.input_quantizer").scale)


def test_tokens_are_counted_expert_by_expert() -> None:
    model, x = mixture(outlier=11.0)
    run = octavo.quantize(model, recipe("share"), [x, x])
    chosen = (x[..., 0] > 0).long() + (x[..., 0] > 10).long()
    expected = [2 * int((chosen == k).sum()) for k in range(3)]
    assert [(layer.name, layer.policy, layer.tokens) for layer in run.record.experts] == [
        ("0.experts", "share", expected)
    ]
    assert any("1 of 3 experts of '0.experts' saw fewer than 4 tokens" in warning for warning in run.record.warnings)


def test_a_rare_expert_shares_the_ranges_of_its_siblings() -> None:
    model, x = mixture()
    run = octavo.quantize(model, recipe("share"), [x])
    assert scale(run, 2) == max(scale(run, 0), scale(run, 1)) == pytest.approx(float(x.abs().max()) / 448)


def test_all_tokens_go_through_all_experts() -> None:
    model, x = mixture()
    run = octavo.quantize(model, recipe("all-tokens"), [x])
    assert [scale(run, k) for k in range(3)] == pytest.approx([float(x.abs().max()) / 448] * 3)
    assert run.record.experts[0].tokens[2] == 0


def test_an_error_names_the_rare_expert_and_leaves_the_model_as_it_was() -> None:
    model, x = mixture()
    before = model(x)
    with pytest.raises(
        UserError, match=r"1 experts saw fewer than 4 .* 0\.experts expert 2 \(0\).*all-tokens or share"
    ):
        octavo.quantize(model, recipe("error"), [x])
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_stacked_experts_are_counted_by_their_router_s_choice(name: str) -> None:
    model, batch = made(name)
    run = octavo.quantize(model, recipe("all-tokens"), [batch])
    tokens = batch["input_ids"].numel()
    assert [sum(layer.tokens) for layer in run.record.experts] == [2 * tokens] * 2
    assert len(find_experts(model)) == 2


def test_a_policy_is_written_in_the_recipe_and_stated_in_the_plan() -> None:
    text = "extends: fp8\ncalibration: {experts: all-tokens, expert_tokens: 9}\n"
    read = read_recipe(text, "mine.yaml")
    assert read_recipe(read.to_yaml(), "again").calibration.experts == ExpertsPolicy.of("all-tokens", 9)
    model, x = mixture()
    plan = octavo.plan(model, read, sample=x)
    assert Plan.from_json(plan.to_json()).experts == ExpertsPolicy.of("all-tokens", 9)
    with pytest.raises(UserError, match=r"mine.yaml, line 2: calibration experts is 'all': it is one of error, all-t"):
        read_recipe("extends: fp8\ncalibration: {experts: all}\n", "mine.yaml")


def test_a_model_without_experts_has_no_policy() -> None:
    plan: Any = octavo.plan(nn.Linear(4, 4), "fp8", sample=torch.randn(1, 4))
    assert plan.experts is None
    assert dataclasses.replace(plan, experts=None).to_json() == plan.to_json()


@pytest.mark.slow
def test_a_branch_that_only_compiled_code_takes_is_rounded_too() -> None:
    model, batch = made("mixtral")
    run = octavo.quantize(
        model, load_recipe("fp8").with_steps(make_step("rotate"), make_step("svdquant", {"rank": 4})), [batch]
    )
    assert any("experts" in name and "input" in name for name in run.door.quantizer_names())
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(outputs(compiled, batch), outputs(model, batch))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_rounded_alike_by_every_implementation(name: str, implementation: str) -> None:
    model, batch = made(name)
    model.set_experts_implementation(implementation)
    run = octavo.quantize(model, "fp8", [batch])
    per_expert = [d for d in run.plan.decisions if len(d.site.weight_shape) == 3]
    assert [str(d.weight) for d in per_expert] == ["e4m3 per matrix"] * 4
    assert len([q for q in run.door.quantizer_names() if ".experts" in q and "input" in q]) == 4
    reference, _ = made(name)
    reference.set_experts_implementation("grouped_mm")
    octavo.quantize(reference, "fp8", [batch])
    assert torch.allclose(outputs(model, batch), outputs(reference, batch), rtol=1e-3, atol=1e-3)
