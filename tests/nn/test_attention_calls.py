"""Attention that a user's module computes itself is found by observation, however the call is written."""

from __future__ import annotations

import copy
import linecache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import octavo
from nn.attention_zoo import WAYS, Directly
from octavo.nn.door import TorchDoor
from octavo.spec.recipe import Recipe
from octavo.spec.resolve import resolve

SLOTS = {"query": "q_bmm", "key": "k_bmm", "value": "v_bmm", "attention_output": "bmm2_output"}
every_way = pytest.mark.parametrize("name", WAYS)


def recipe(element: str) -> Recipe:
    return Recipe(element, ()).quantize("operation:attention", **dict.fromkeys(SLOTS, f"{element}-tensor"))


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return WAYS[name][0]().eval(), torch.randn(2, 5, 16)


@every_way
def test_every_call_expression_gets_four_quantizers_that_act(name: str) -> None:
    model, x = made(name)
    expected = model(x)
    run = octavo.quantize(model, recipe("int2"), [x])
    names = run.door.quantizer_names()
    assert len(names) == 4 * WAYS[name][1]
    assert all(name.rpartition(".")[2].removesuffix("_quantizer") in SLOTS.values() for name in names)
    for quantizer in names:
        with run.door.disabled(lambda other, kept=quantizer: other != kept):
            assert not torch.equal(model(x), expected), f"{quantizer} does nothing"
    with run.door.disabled(lambda name: True):
        assert torch.equal(model(x), expected)


@every_way
def test_it_comes_apart_again(name: str) -> None:
    model, x = made(name)
    expected, classes = model(x), [type(m) for m in model.modules()]
    octavo.quantize(model, recipe("int4"), [x])
    twin = copy.deepcopy(model)
    simulated = model(x)
    octavo.strip(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected)
    assert torch.equal(twin(x), simulated)
    assert WAYS[name][0].__name__ in {type(m).__name__ for m in twin.modules()}


def test_other_instances_of_the_class_are_not_touched() -> None:
    model, x = made("Directly")
    other, _ = made("Directly")
    expected = other(x)
    octavo.quantize(model, recipe("int2"), [x])
    assert not torch.equal(model(x), expected)
    assert torch.equal(other(x), expected)
    assert type(other) is Directly


def test_two_models_of_one_class_have_ranges_of_their_own() -> None:
    (one, x), (two, _) = made("TwiceThroughOneHelper"), made("TwiceThroughOneHelper")
    octavo.quantize(one, recipe("int4"), [x])
    simulated = one(x)
    octavo.quantize(two, recipe("int4"), [10 * x])
    assert torch.equal(one(x), simulated)
    assert not torch.equal(two(x), simulated)


def test_what_the_four_quantizers_do_is_attention_on_rounded_tensors() -> None:
    model, x = made("WithKeywords")
    octavo.quantize(model, recipe("int4"), [x])
    q, k, v = model.heads(x)
    q, k, v = model.q_bmm_quantizer(q), model.k_bmm_quantizer(k), model.v_bmm_quantizer(v)
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert torch.equal(model(x), model.merge(model.bmm2_output_quantizer(y)))


def test_a_call_in_a_function_without_source_is_refused_with_the_way_out() -> None:
    space: dict = {"Directly": Directly, "F": nn.functional}
    exec(
        "class Typed(Directly):\n"
        "    def forward(self, x):\n"
        "        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))\n",
        space,
    )
    model, x = nn.Sequential(space["Typed"]()), torch.randn(2, 5, 16)
    expected = model(x)
    with pytest.raises(octavo.UserError, match=r"attention call in '0' \(Typed\) cannot be reached.*octavo.register"):
        octavo.quantize(model, recipe("int8"), [x])
    assert torch.equal(model(x), expected)
    octavo.quantize(model, "fp8", [x])


def test_a_class_from_a_notebook_cell_is_read_from_there() -> None:
    source = (
        "class Cell(Directly):\n"
        "    def forward(self, x):\n"
        "        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))\n"
    )
    name, space = "<ipython-input-1>", {"Directly": Directly, "F": nn.functional}
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), space)
    model, x = space["Cell"](), torch.randn(2, 5, 16)
    expected = model(x)
    octavo.quantize(model, recipe("int2"), [x])
    assert not torch.equal(model(x), expected)


def test_a_forward_that_is_no_method_is_refused_and_not_silently_passed_over() -> None:
    model, x = made("Directly")
    model.forward = lambda x: model.merge(nn.functional.scaled_dot_product_attention(*model.heads(x)))
    with pytest.raises(octavo.UserError, match=r"cannot be reached: .* is not a method of Directly"):
        octavo.quantize(model, recipe("int8"), [x])


def test_without_a_sample_the_plan_says_that_attention_was_not_seen() -> None:
    model, _ = made("Directly")
    facts = TorchDoor(model).facts()
    assert not facts.was_traced
    assert "no sample was traced" in facts.notes[0]
    with pytest.raises(octavo.UserError, match="none was traced"):
        resolve(recipe("int8"), facts)


SEVERAL_GRAPHS = {
    "Decorated": "torch.no_grad as a decorator",
    "ThroughMethodOfObject": "torch.compile does not compare methods of an object that it made itself",
}


@pytest.mark.slow
@every_way
def test_it_compiles_with_the_same_bits_into_one_graph_where_torch_can(name: str) -> None:
    model, x = made(name)
    octavo.quantize(model, recipe("int4"), [x])
    simulated = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name not in SEVERAL_GRAPHS)
    with torch.no_grad():
        assert torch.equal(compiled(x), simulated)
    if name not in SEVERAL_GRAPHS:
        assert torch.equal(torch.export.export(model, (x,)).module()(x), simulated)


@pytest.mark.slow
def test_a_loaded_run_compiles_before_its_first_call(tmp_path: Path) -> None:
    model, x = made("ThroughHelpers")
    octavo.save(octavo.quantize(model, recipe("int4"), [x]), tmp_path / "run")
    loaded = octavo.load(tmp_path / "run", made("ThroughHelpers")[0], sample=x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(loaded.model, backend="aot_eager", fullgraph=True)(x), model(x))
