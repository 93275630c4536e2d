"""Scales and rotations of what experts in one tensor read: scales move into what is before, and the router follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from algorithms.outliers import plant_experts
from octavo.nn.choices import Choices
from octavo.nn.door import TorchDoor
from octavo.nn.lowered import lower
from octavo.numerics.block import InputGroup
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.spec.recipe import Recipe
from octavo.spec.resolve import resolve
from octavo.spec.steps import make_step
from zoo.table import made

SPELLINGS = ["eager", "grouped_mm", "batched_mm"]
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3"]
KEPT = {"gpt_oss"}  # whose second matrices read (up + 1) * gate, which is linear in nothing


def built(name: str, spelling: str = "grouped_mm") -> tuple[nn.Module, list[dict[str, Any]]]:
    model, batch = made(name)
    if name != "llama4":  # it has a spelling of its own
        model.set_experts_implementation(spelling)
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 64, (4, 24), generator=generator) for _ in range(3)]
    return model.eval(), [{**batch, "input_ids": text} for text in texts]


def logits(model: nn.Module, data: list[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch)[0] for batch in data])


def recipe(weight: str, *steps: Any, **inputs: str) -> Recipe:
    return Recipe("r", ()).quantize("operation:linear", weight=weight, **inputs).with_steps(*steps)


def static_int8(*steps: Any) -> Recipe:
    rule = Recipe("r", ()).quantize("operation:linear", weight="int8-channel", input="int8-tensor")
    return rule.with_steps(*steps)


def groups(model: nn.Module, data: list[dict[str, Any]]) -> Iterator[tuple[Any, InputGroup]]:
    """Every group of layers of experts, before anything is rounded."""
    door = TorchDoor(model, "test", data[0])
    door.prepare(resolve(recipe("int4-channel"), door.facts()))
    with Store() as store, door.evaluating():
        for block in door.walk(data, store, is_quantized=False, keeps_unquantized=False):
            block.gather(frozenset({Need.RANGE}))
            yield from ((block, g) for g in block.scale_groups() if any(name.endswith("]") for name in g.layers))
            block.advance()


@pytest.mark.parametrize(
    ("name", "spelling"), [("mixtral", s) for s in SPELLINGS] + [(name, "grouped_mm") for name in FAMILIES[1:]]
)
@torch.no_grad()
def test_factors_move_where_nothing_is_left_of_them(name: str, spelling: str) -> None:
    model, data = built(name, spelling)
    before, weights = logits(model, data), {k: v.clone() for k, v in model.state_dict().items()}
    generator, scaled = torch.Generator().manual_seed(2), 0
    for block, group in groups(model, data):
        is_second = "#linear1[" in group.layers[-1]
        assert group.takes_scale
        assert (group.fold is not None) == (not is_second or name not in KEPT), group.layers
        assert (len(group.layers) == 1) == (is_second and name not in KEPT)
        last, scale = group.layers[-1], torch.rand(group.num_channels, generator=generator) * 3 + 0.3
        weight, low = block.read_weight(last).clone(), block.statistics(last).low
        block.set_pre_scale(group, scale)
        torch.testing.assert_close(block.read_weight(last), weight * scale)
        torch.testing.assert_close(block.statistics(last).low, low / scale)
        scaled += 1
    assert scaled >= 2
    assert any("input_transform" in path for path, _ in model.named_modules()) == (name in KEPT)
    torch.testing.assert_close(logits(model, data), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    changed = {
        key for key, value in model.state_dict().items() if key in weights and not torch.equal(value, weights[key])
    }
    assert any("norm" in key for key in changed), changed
    assert any("router" in key or ".gate.weight" in key for key in changed), changed


def lost(name: str, spelling: str, chosen: Recipe) -> float:
    """Squared error of the logits that quantization adds, over their squares."""
    model, data = built(name, spelling)
    plain = logits(model, data)
    plant_experts(model)
    torch.testing.assert_close(logits(model, data), plain, rtol=1e-3, atol=1e-3)
    octavo.quantize(model, chosen, data)
    return float((logits(model, data) - plain).square().sum() / plain.square().sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spelling"), [("mixtral", "eager"), ("mixtral", "batched_mm"), ("qwen3_moe", "grouped_mm")]
)
def test_scales_take_the_loss_of_outliers_away(name: str, spelling: str) -> None:
    clipped = lost(name, spelling, recipe("int4-channel", make_step("scale_search", {"measure": "gram"})))
    assert lost(name, spelling, recipe("int4-channel", make_step("awq"))) < 0.7 * clipped
    plain = lost(name, spelling, static_int8())
    for alpha in (0.5, "search"):
        step = make_step("smoothquant", {"alpha": alpha})
        assert lost(name, spelling, static_int8(step)) < 0.3 * plain, alpha
    assert lost(name, spelling, static_int8(make_step("rotate"))) < 0.5 * plain


@pytest.mark.parametrize(
    ("name", "spelling", "weight", "step"),
    [
        ("mixtral", "grouped_mm", "nvfp4", make_step("awq")),
        ("llama4", "", "int4-channel", make_step("awq")),
        ("gpt_oss", "grouped_mm", "int4-channel", make_step("awq")),
        *(("mixtral", spelling, "nvfp4", make_step("rotate")) for spelling in SPELLINGS),
        ("llama4", "", "int4-channel", make_step("rotate")),
        ("gpt_oss", "eager", "int4-channel", make_step("rotate", {"where": ["residual", "heads", "online"]})),
        *(("gpt_oss", spelling, "int8-channel", make_step("svdquant", {"rank": 4})) for spelling in SPELLINGS),
        ("llama4", "", "int4-channel", make_step("svdquant", {"rank": 4})),
    ],
)
@torch.no_grad()
def test_what_was_done_to_experts_is_saved_and_comes_back(
    name: str, spelling: str, weight: str, step: Any, tmp_path: Path
) -> None:
    model, data = built(name, spelling)
    done = octavo.quantize(model, recipe(weight, step), data, checkpoint=tmp_path / "kept")
    assert not any("left it alone" in warning for warning in done.record.warnings)
    run = octavo.save(done, tmp_path / "run")
    again = octavo.load(tmp_path / "run", built(name, spelling)[0], sample=data[0])
    assert torch.equal(logits(again.model, data), logits(run.model, data))
    assert octavo.verify(tmp_path / "run", run, data).agrees
    assert run.record.bytes_after == run.plan.bytes_after


@torch.no_grad()
def test_the_implementation_that_was_quantized_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, data = built("mixtral", "grouped_mm")
    octavo.quantize(model, recipe("int8-channel", make_step("rotate")), data)
    before = logits(model, data)
    model.set_experts_implementation("batched_mm")
    assert "implementation of experts stays" in caplog.text
    assert torch.equal(logits(model, data), before)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Experts in a list; ``calls_all``: those that no token is sent to are called with no rows."""

    def __init__(self, *, calls_all: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.router = nn.RMSNorm(32), nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.calls_all = calls_all

    def forward(self, x: Tensor) -> Tensor:
        y, out = self.norm(x), torch.zeros_like(x)
        chosen = self.router(y).argmax(-1)
        for k, expert in enumerate(self.experts):
            if self.calls_all or bool((chosen == k).any()):
                out[chosen == k] = expert(y[chosen == k])
        return x + out


@pytest.mark.parametrize("calls_all", [False, True])
@torch.no_grad()
def test_experts_in_a_list_agree_on_a_scale_those_that_the_trial_missed_among_them(calls_all: bool) -> None:
    model = nn.Sequential(Mixture(calls_all=calls_all)).eval()
    x = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(3))
    x[0] = x[0, :1] + 0.01 * x[0]  # the sample on which factors are tried goes to one expert
    assert len(model[0].router(model[0].norm(x[:1])).argmax(-1).unique()) == 1
    before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    chosen = Recipe("r", ()).quantize("*experts*", weight="int8-channel").with_steps(make_step("smoothquant"))
    run = octavo.quantize(model, chosen, [x])
    with run.door.disabled(lambda name: True):
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    assert not torch.equal(model[0].norm.weight, weights["0.norm.weight"])
    assert not torch.equal(model[0].router.weight, weights["0.router.weight"])
    assert not any("input_transform" in path and "down" not in path for path, _ in model.named_modules())


@pytest.mark.parametrize("step", [make_step("smoothquant"), make_step("rotate", {"where": ["residual", "online"]})])
def test_experts_that_rounding_chooses_stop_no_step(step: Any) -> None:
    model, data = built("mixtral")
    model.to(torch.bfloat16)
    before = logits(model, data).float()
    octavo.quantize(model, recipe("int8-channel", step), data)
    assert (logits(model, data).float() - before).norm() < 0.2 * before.norm()


@torch.no_grad()
def test_choices_of_one_pass_are_made_again_in_another() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]])
    with Choices() as first:
        torch.topk(scores, 2, dim=-1), scores.argmax(-1)
    with Choices(first):
        values, indices = torch.topk(-scores, 2, dim=-1)
        assert torch.equal(indices, torch.tensor([[1, 2], [0, 1]]))
        assert torch.equal(values, -scores.gather(1, indices))
        assert (-scores).argmax(-1).tolist() == [1, 0]
        assert (-scores).topk(3).indices.tolist() == [[0, 2, 1], [2, 1, 0]], "none like it was made before"


@torch.no_grad()
def test_branches_beside_stacks_see_inputs_before_rounding() -> None:
    found: dict[str, Tensor] = {}
    for spelling in SPELLINGS:
        model, data = built("mixtral", spelling)
        before = logits(model, data)
        plain = octavo.quantize(model, recipe("nvfp4", input="nvfp4"), data)
        lost_plain = float((logits(model, data) - before).norm())
        plain.door.strip()
        run = octavo.quantize(model, recipe("nvfp4", make_step("svdquant", {"rank": 16}), input="nvfp4"), data)
        found[spelling] = logits(model, data)
        assert float((found[spelling] - before).norm()) < 0.8 * lost_plain, spelling
        with run.door.disabled(lambda name: "input" in name):
            assert float((logits(model, data) - before).norm()) < float((found[spelling] - before).norm())
        lower(model)
        torch.testing.assert_close(logits(model, data), found[spelling])
    for spelling in SPELLINGS[1:]:
        torch.testing.assert_close(found[spelling], found[SPELLINGS[0]], rtol=1e-3, atol=1e-3)
