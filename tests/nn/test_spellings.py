"""Wherever tensors meet is a site, however the meeting is written."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo
from nn.spelling_zoo import WAYS
from octavo.nn.door import TorchDoor
from octavo.spec.facts import Slot
from octavo.spec.recipe import Recipe
from octavo.spec.resolve import resolve

every_way = pytest.mark.parametrize("name", WAYS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    cls, make, _ = WAYS[name]
    return cls().eval(), make()


def everything(model: nn.Module, x: Tensor, element: str) -> Recipe:
    """Every slot of every site."""
    recipe = Recipe("everything", ())
    for site in TorchDoor(model, "", x).facts().sites:
        if site.slots:
            slots = {slot.value: f"{element}-tensor" for slot in site.slots}
            recipe = recipe.quantize(f"re:{site.name.replace('(', '.').replace(')', '.')}", **slots)
    return recipe


def prepared(model: nn.Module, x: Tensor, element: str) -> octavo.Run:
    return octavo.quantize(model, everything(model, x, element), [x])


@every_way
def test_the_sites_are_those_that_the_code_says(name: str) -> None:
    model, x = made(name)
    facts = TorchDoor(model, "", x).facts()
    assert {s.name: " ".join(slot.value for slot in s.slots) for s in facts.sites if s.slots} == WAYS[name][2]
    claimed = [key for site in facts.sites for key in site.parameters]
    assert sorted(claimed) == sorted(key for key, _ in model.named_parameters())
    assert all(site.macs for site in facts.sites if site.operation not in ("other", "embedding"))


@every_way
def test_no_quantizer_is_inert(name: str) -> None:
    model, x = made(name)
    expected = model(x)
    run = prepared(model, x, "int2")
    tied = {d.site.name for d in run.plan.decisions if d.site.tied_to}
    wanted = sum(len(slots.split()) for site, slots in WAYS[name][2].items() if site not in tied)
    assert len(run.door.quantizer_names()) == wanted
    for quantizer in run.door.quantizer_names():
        with run.door.disabled(lambda other, kept=quantizer: other != kept):
            assert not torch.equal(model(x), expected), f"{quantizer} does nothing"
    with run.door.disabled(lambda name: True):
        assert torch.allclose(model(x), expected, atol=1e-6)


@every_way
def test_it_comes_apart_again_and_a_copy_lives_on(name: str) -> None:
    model, x = made(name)
    expected, classes = model(x), [type(m) for m in model.modules()]
    prepared(model, x, "int4")
    simulated, twin = model(x), copy.deepcopy(model)
    octavo.strip(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected)
    assert torch.equal(twin(x), simulated)


@every_way
def test_a_saved_run_and_packed_weights_compute_the_same(name: str, tmp_path) -> None:
    model, x = made(name)
    run = prepared(model, x, "int4")
    simulated = model(x)
    octavo.save(run, tmp_path / "run")
    loaded = octavo.load(tmp_path / "run", made(name)[0], sample=x)
    assert torch.equal(loaded.model(x), simulated)
    octavo.lower(model)
    assert torch.equal(model(x), simulated)


@pytest.mark.slow
@every_way
def test_it_compiles_and_exports_into_one_graph_with_the_same_bits(name: str) -> None:
    model, x = made(name)
    prepared(model, x, "int4")
    torch._dynamo.reset()
    with torch.no_grad():
        simulated = model(x)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), simulated)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), simulated)


def test_probabilities_have_a_fixed_range_that_needs_no_data() -> None:
    model, _ = made("Fused")
    for fmt, scale in (("e4m3-tensor", 1 / 448), ("int8-tensor", 1 / 127)):
        octavo.quantize(model, Recipe("p", ()).quantize("(model)", softmax=fmt), sample=made("Fused")[1])
        assert float(model.softmax_quantizer.scale) == pytest.approx(scale)
        octavo.strip(model)


def test_an_unfused_call_is_the_fused_one_on_rounded_probabilities() -> None:
    for name in ("Fused", "FusedWithGroups"):
        model, x = made(name)
        model.requires_grad_(False)
        expected = model(x)
        run = octavo.quantize(model, Recipe("p", ()).quantize("(model)", softmax="int8-tensor"), sample=x)
        with run.door.disabled(lambda name: True):
            assert torch.allclose(model(x), expected, atol=1e-6)
        assert 0 < float((model(x) - expected).abs().max()) < 0.05


class Scaled(nn.Module):
    """The operand is more than a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.rand(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).t()


def test_a_computed_weight_is_left_with_the_reason() -> None:
    model, x = nn.Sequential(Scaled(), nn.Linear(6, 4)), torch.randn(2, 5, 8)
    plan = octavo.plan(model, "fp8", sample=x)
    assert "computed from 0.weight and 0.scale" in plan.decision("0").why
    assert plan.decision("0").site.macs == 2 * 5 * 6 * 8


class Kept(nn.Module):
    """Holds a view of its parameter, made before any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.view = self.weight.detach().t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.view


def test_a_view_from_before_is_seen_and_left_with_the_reason() -> None:
    facts = TorchDoor(Kept(), "", torch.randn(2, 8)).facts()
    assert any("memory of weight" in site.obstacle for site in facts.sites)


def test_multiply_adds_add_up_to_the_forward() -> None:
    model, x = made("WithBiasAndMask")
    plan = resolve(Recipe("w", ()).quantize("qkv", weight="int8-tensor"), TorchDoor(model, "", x).facts())
    assert sum(d.site.macs or 0 for d in plan.decisions) == 2 * 5 * 8 * 24 + 2 * (2 * 5 * 5 * 8)


def test_without_a_sample_the_plan_says_what_it_did_not_see() -> None:
    model, _ = made("FunctionalLinear")
    facts = TorchDoor(nn.Sequential(model, nn.Linear(6, 4))).facts()
    assert "no sample was traced" in facts.notes[0]
    assert "without a sample" in next(site.obstacle for site in facts.sites if site.name == "0")


def test_an_error_in_the_forward_leaves_no_hook_and_no_mode() -> None:
    model, _ = made("WrittenOut")
    with pytest.raises(RuntimeError):
        TorchDoor(model, "", torch.randn(2, 5, 7)).facts()
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert Slot.SOFTMAX in TorchDoor(model, "", torch.randn(2, 5, 8)).facts().sites[0].slots


class Doubling(torch.autograd.Function):
    """Between the module's method and the product stands C++, which no call expression leads through."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return 2 * F.linear(x, weight)


class ThroughAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(x, self.weight)


def test_a_quantizer_that_nothing_asks_is_off_and_told() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), ThroughAutograd()).eval(), torch.randn(2, 5, 8)
    recipe = Recipe("w", ()).quantize("*", weight="int8-channel", input="int8-token", output="int8-tensor")
    run = octavo.quantize(model, recipe, [x, x])
    assert "1.input_quantizer" not in run.door.quantizer_names()
    assert "1.weight_quantizer" in run.door.quantizer_names()
    assert any("1.input_quantizer" in warning and "stays off" in warning for warning in run.record.warnings)


def test_a_forward_on_the_instance_is_told_and_not_bypassed_in_silence() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), WAYS["Operator"][0]()), torch.randn(2, 5, 8)
    for layer in model:
        layer.forward = layer.forward
    facts = TorchDoor(model, "", x).facts()
    assert len(facts.sites) == 2
    assert all("replaced on the instance" in site.obstacle and not site.slots for site in facts.sites)


def test_the_layer_that_holds_a_weight_comes_before_others_that_read_it() -> None:
    model, ids = made("TiedHead")
    facts = TorchDoor(model, "", ids).facts()
    assert {site.name: site.tied_to for site in facts.sites if site.tied_to} == {"(model)#linear0": "embed"}
