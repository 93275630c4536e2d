"""Steps on weights that functions compute with: experts in one tensor, matrix by matrix, and functional layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo
from octavo.nn.door import TorchDoor
from octavo.numerics.block import site_of
from octavo.numerics.qtensor import quantize
from octavo.numerics.statistics import InputStatistics, Need
from octavo.numerics.store import Store
from octavo.spec.formats import tensor_format
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve
from octavo.spec.steps import make_step
from zoo.table import made

NUM_EXPERTS, WIDTH, HIDDEN = 4, 32, 64


class Experts(nn.Module):
    """Stacks, computed with as ``spelling`` says; a token goes to the expert of its largest channel."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)  # its input axis comes first

    def forward(self, x: Tensor) -> Tensor:
        chosen = route(x)
        match self.spelling:
            case "loop":
                y = torch.zeros_like(x)
                for k in range(NUM_EXPERTS):
                    rows = x[chosen == k]
                    y[chosen == k] = torch.relu(F.linear(rows, self.up[k])) @ self.down[k]
                return y
            case "selected":
                hidden = torch.relu(torch.bmm(self.up[chosen], x.unsqueeze(-1)).squeeze(-1))
                return torch.bmm(hidden.unsqueeze(1), self.down[chosen]).squeeze(1)
            case "grouped":
                order = chosen.argsort(stable=True)
                ends = torch.bincount(chosen, minlength=NUM_EXPERTS).cumsum(0).int()
                hidden = F.grouped_mm(x[order], self.up.transpose(-2, -1), offs=ends)
                back = F.grouped_mm(torch.relu(hidden), self.down, offs=ends)
                return torch.zeros_like(x).index_copy(0, order, back)
            case "einsum":
                hidden = torch.relu(torch.einsum("end,ehd->enh", x.expand(NUM_EXPERTS, -1, -1), self.up))
                return torch.einsum("enh,ehd->end", hidden, self.down)[chosen, torch.arange(len(x))]
        raise AssertionError(self.spelling)


def route(x: Tensor) -> Tensor:
    return x[:, :NUM_EXPERTS].argmax(-1)


def batches(experts: int = NUM_EXPERTS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator) / 5
    made = [torch.randn(160, WIDTH, generator=generator) @ mixed for _ in range(2)]
    for x in made:
        x[:, experts:NUM_EXPERTS] -= 100  # nothing goes to the others
    return made


def recipe(weight: str, *steps: str | Any) -> Recipe:
    plain = Recipe("r", ()).quantize("operation:linear", weight=weight)
    return plain.with_steps(*(make_step(s, {"steps": 8}) if s == "learned_rounding" else make_step(s) for s in steps))


def gathered(model: nn.Module, data: list[Any], *needs: Need) -> dict[str, InputStatistics]:
    door = TorchDoor(model, "test", data[0])
    door.prepare(resolve(recipe("int4-channel"), door.facts()))
    found: dict[str, InputStatistics] = {}
    with Store() as store, door.evaluating():
        for block in door.walk(data, store, is_quantized=False, keeps_unquantized=False):
            block.gather(frozenset(needs))
            found |= {layer: block.statistics(layer) for layer in block.layers()}
            block.settle()
            block.advance()
    return found


@pytest.mark.parametrize("spelling", ["loop", "selected", "grouped", "einsum"])
@torch.no_grad()
def test_every_expert_learns_from_its_own_tokens(spelling: str) -> None:
    model, data = Experts(spelling).eval(), batches()
    up = model.up.clone()
    found = gathered(nn.Sequential(model), data, Need.GRAM)
    assert len(found) == 2 * NUM_EXPERTS
    x = torch.cat(data)
    for k in range(NUM_EXPERTS):
        rows = x if spelling == "einsum" else x[route(x) == k]
        hidden = torch.relu(rows @ up[k].T)
        ours = [stats for layer, stats in found.items() if layer.endswith(f"[{k}]")]
        assert [stats.count for stats in ours] == [len(rows), len(rows)]
        torch.testing.assert_close(ours[0].gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours[1].gram, hidden.T @ hidden, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "granite_moe", "llama4"])
def test_experts_of_transformers_do(name: str) -> None:
    model, batch = made(name)
    heard: list[tuple[Any, ...]] = []
    path = next(path for path, module in model.named_modules() if path.endswith("experts"))
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: heard.append(args))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    found = {k: v for k, v in gathered(model, [batch], Need.GRAM).items() if site_of(k).startswith(path)}
    assert found
    first = [stats for layer, stats in found.items() if "#linear0[" in layer]
    if len(heard[0]) > 1:
        x, chosen = heard[0][0].flatten(0, -2), heard[0][1]
        for k, stats in enumerate(first):
            rows = x[(chosen == k).any(-1)].float()
            expected = rows.T @ rows if len(rows) else torch.eye(x.shape[-1])
            torch.testing.assert_close(stats.gram, expected, rtol=1e-4, atol=1e-3)
    else:
        rows = heard[0][0].view(len(first), -1, heard[0][0].shape[-1])  # each is handed rows of its own
        for k, stats in enumerate(first):
            torch.testing.assert_close(stats.gram, rows[k].T @ rows[k], rtol=1e-4, atol=1e-3)


def error(spelling: str, chosen: Recipe, fmt: str = "") -> float:
    model, data = nn.Sequential(Experts(spelling)).eval(), batches()
    with torch.no_grad():
        full = [model(x) for x in data]
        octavo.quantize(model, chosen, data)
        return float(sum((model(x) - y).square().sum() for x, y in zip(data, full, strict=True)))


@pytest.mark.parametrize("fmt", ["int4-channel", "int4-group32", "nvfp4", "int4-tensor"])
def test_steps_better_experts(fmt: str) -> None:
    plain = error("loop", recipe(fmt))
    for step in ("scale_search", "gptq", "learned_rounding"):
        assert error("loop", recipe(fmt, step)) < 0.95 * plain, step


def test_awq_clips_what_it_cannot_scale() -> None:
    assert error("grouped", recipe("int4-channel", "awq")) < 0.95 * error("grouped", recipe("int4-channel"))


def test_experts_without_tokens_go_by_their_weights() -> None:
    model, data = nn.Sequential(Experts("loop")).eval(), batches(experts=3)
    run = octavo.quantize(model, recipe("int4-channel", "gptq"), data)
    for number in (0, 1):
        text = f"layer '0#linear{number}', 1 of 4 matrices (3): no token of the calibration data was sent there"
        assert any(warning.startswith(text) for warning in run.record.warnings), run.record.warnings
    layer = next(layer for layer in run.door.snapshot().layers() if layer.name == "0#linear0")
    weight = Experts("loop").up[3].detach()
    ours = (layer.weight.dequantize()[3] - weight).square().sum()
    nearest = (quantize(weight, tensor_format("int4-channel")).dequantize() - weight).square().sum()
    assert ours < nearest


@torch.no_grad()
@pytest.mark.parametrize("fmt", ["nvfp4", "int4-group32", "mxfp4"])
def test_they_are_saved_and_come_back(fmt: str, tmp_path: Path) -> None:
    model, data = nn.Sequential(Experts("loop")).eval(), batches()
    run = octavo.save(octavo.quantize(model, recipe(fmt, "gptq"), data, checkpoint=tmp_path / "kept"), tmp_path / "run")
    again = octavo.load(tmp_path / "run", nn.Sequential(Experts("loop")).eval(), sample=data[0])
    assert torch.equal(again.model(data[0]), run.model(data[0]))
    assert octavo.verify(tmp_path / "run", run, data).agrees
    assert run.record.bytes_after == run.plan.bytes_after


class Functional(nn.Module):
    """A weight of its own, which a function computes with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@torch.no_grad()
def test_functional_layers_with_weights_alone_are_heard() -> None:
    data = batches()
    found = gathered(nn.Sequential(Functional()).eval(), data, Need.GRAM)
    rows = torch.cat(data)
    torch.testing.assert_close(found["0"].gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
    model = nn.Sequential(Functional()).eval()
    run = octavo.quantize(model, recipe("int4-channel", "gptq"), data)
    assert not any("left it alone" in warning for warning in run.record.warnings)


def test_a_preset_serves_experts_in_one_tensor() -> None:
    model, batch = made("mixtral")
    steps = load_recipe("int4-gptq").steps
    run = octavo.quantize(model, recipe("int4-channel").with_steps(*steps), [batch])
    assert not any("left it alone" in warning for warning in run.record.warnings)
