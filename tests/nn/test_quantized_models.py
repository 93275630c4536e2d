"""What holds for every quantized model, whatever it is made of."""

from __future__ import annotations

import copy

import pytest
import torch

import octavo
from nn.models import ZOO, made, outputs
from octavo.errors import UserError
from octavo.nn.door import TorchDoor
from octavo.nn.quantizer import Quantizer
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve

EVERYTHING = load_recipe("fp8-attention")
everyone = pytest.mark.parametrize("name", ZOO)


def tree(model: torch.nn.Module) -> list[tuple[str, type, frozenset[str]]]:
    return [(path, type(m), frozenset(m.__dict__)) for path, m in model.named_modules()]


@everyone
def test_every_parameter_is_in_exactly_one_site(name: str) -> None:
    model, batch = made(name)
    facts = TorchDoor(model, name, batch).facts()
    claimed = [key for site in facts.sites for key in site.parameters]
    assert sorted(claimed) == sorted(key for key, _ in model.named_parameters())
    assert sum(sum(site.parameters.values()) for site in facts.sites) == facts.num_parameters


@everyone
def test_looking_changes_nothing_and_leaves_no_mode(name: str) -> None:
    model, batch = made(name)
    before, state = outputs(model, batch), tree(model)
    TorchDoor(model, name, batch).facts()
    assert torch.equal(outputs(model, batch), before)
    assert tree(model) == state
    assert torch._C._len_torch_function_stack() == 0


@everyone
def test_strip_gives_back_the_model_bit_for_bit(name: str) -> None:
    model, batch = made(name)
    before, state = outputs(model, batch), tree(model)
    octavo.quantize(model, EVERYTHING, [batch])
    assert not torch.equal(outputs(model, batch), before)
    octavo.strip(model)
    assert torch.equal(outputs(model, batch), before)
    assert tree(model) == state


@everyone
def test_no_quantizer_is_inert(name: str) -> None:
    """Coarsening any one quantizer to two bits changes the output."""
    model, batch = made(name)
    operations = {site.operation for site in TorchDoor(model, name, batch).facts().sites}
    recipe = Recipe("coarse", ())
    for operation in operations & {"linear", "conv", "conv_transposed"}:
        recipe = recipe.quantize(f"operation:{operation}", weight="int2-tensor", input="int2-tensor")
    if "attention" in operations:
        slots = dict.fromkeys(("query", "key", "value", "attention_output"), "int2-tensor")
        recipe = recipe.quantize("operation:attention", **slots)
    before = outputs(model, batch)
    run = octavo.quantize(model, recipe, [batch])
    for quantizer in run.door.quantizer_names():
        with run.door.disabled(lambda other, kept=quantizer: other != kept):
            assert not torch.equal(outputs(model, batch), before), f"{quantizer} does nothing"


@everyone
def test_a_deepcopy_computes_the_same_and_is_independent(name: str) -> None:
    model, batch = made(name)
    octavo.quantize(model, EVERYTHING, [batch])
    simulated = outputs(model, batch)
    twin = copy.deepcopy(model)
    octavo.strip(model)
    assert torch.equal(outputs(twin, batch), simulated)


@everyone
def test_state_dict_carries_all_ranges(name: str) -> None:
    model, batch = made(name)
    octavo.quantize(model, EVERYTHING, [batch])
    simulated, state = outputs(model, batch), model.state_dict()
    other, _ = made(name)
    _prepared(other, name, batch)
    other.load_state_dict(state)
    assert torch.equal(outputs(other, batch), simulated)


def _prepared(model: torch.nn.Module, name: str, batch: object) -> None:
    door = TorchDoor(model, name, batch)
    door.prepare(resolve(EVERYTHING, door.facts()))


@everyone
def test_compiles_into_one_graph_with_the_same_bits(name: str) -> None:
    model, batch = made(name)
    octavo.quantize(model, EVERYTHING, [batch])
    simulated = outputs(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(outputs(compiled, batch), simulated)


@everyone
def test_lowered_weights_are_the_simulation_in_fewer_bytes(name: str) -> None:
    model, batch = made(name)
    run = octavo.quantize(model, EVERYTHING, [batch])
    simulated = outputs(model, batch)
    octavo.lower(model)
    assert torch.equal(outputs(model, batch), simulated)
    stored = sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())
    assert stored <= run.plan.bytes_after + 64
    with pytest.raises(UserError, match="original weights are gone"):
        octavo.strip(model)


@everyone
def test_a_saved_run_restores_outputs_bit_for_bit(name: str, tmp_path) -> None:
    model, batch = made(name)
    run = octavo.quantize(model, EVERYTHING, [batch])
    simulated = outputs(model, batch)
    octavo.save(run, tmp_path / "run")
    fresh, _ = made(name)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    loaded = octavo.load(tmp_path / "run", fresh, sample=batch)
    assert torch.equal(outputs(loaded.model, batch), simulated)
    verified = octavo.verify(tmp_path / "run", loaded, [batch])
    assert verified.agrees
    assert verified.weights.num_weights > 0


@pytest.mark.parametrize("preset", ["fp8", "fp8-dynamic", "int8", "int8-dynamic", "int8-weight-only"])
def test_every_preset_quantizes_saves_and_reloads(preset: str, tmp_path) -> None:
    model, batch = made("bert")
    before = outputs(model, batch)
    run = octavo.quantize(model, preset, [batch])
    simulated = outputs(model, batch)
    cosine = torch.cosine_similarity(simulated, before, dim=0)
    assert 0.98 < float(cosine) < 1
    octavo.save(run, tmp_path / "run")
    loaded = octavo.load(tmp_path / "run", made("bert")[0], sample=batch)
    assert torch.equal(outputs(loaded.model, batch), simulated)


def test_scales_stay_fp32_when_the_model_is_cast() -> None:
    model, batch = made("bert")
    octavo.quantize(model, "fp8", [batch])
    scales = {key: t.clone() for key, t in model.state_dict().items() if key.endswith("_quantizer.scale")}
    model.to(torch.bfloat16)
    for key, scale in scales.items():
        assert torch.equal(model.state_dict()[key], scale)


def test_gradients_pass_straight_through_and_stop_outside_the_range() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    run = octavo.quantize(layer, "int8", [torch.ones(1, 4)])
    assert run.door.quantizer_names()
    x = torch.tensor([[0.5, -0.25, 1.0, 40.0]], requires_grad=True)
    layer(x).sum().backward()
    weight = layer[0].weight_quantizer(layer[0].weight).detach()
    assert torch.allclose(x.grad, weight.sum(0) * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert layer[0].weight.grad is not None


def test_layers_that_read_the_same_tensor_round_and_observe_it_once(monkeypatch) -> None:
    model, batch = made("bert")
    run = octavo.quantize(model, "fp8", [batch])
    outputs(model, batch)  # weights are rounded now, and kept
    rounded = []
    original = torch.ops.octavo.fake_quantize
    monkeypatch.setattr(
        "octavo.nn.quantizer.fake_quantize",
        lambda x, *rest: rounded.append(x) or original(x, rest[1], rest[2], rest[0]),
    )
    outputs(model, batch)
    num_layers = 2
    assert len(rounded) == num_layers * 4 + 1  # q, k and v share one; then the output, two of the MLP; the pooler
    assert len([name for name in run.door.quantizer_names() if "input" in name]) == num_layers * 6 + 1


def test_save_pretrained_is_refused_with_the_way_out(tmp_path) -> None:
    model, batch = made("bert")
    octavo.quantize(model, "fp8", [batch])
    with pytest.raises(UserError, match=r"octavo\.save\(run, path\)"):
        model.save_pretrained(tmp_path / "x")
    octavo.strip(model)
    model.save_pretrained(tmp_path / "x")


def test_generate_works() -> None:
    model, batch = made("llama")
    octavo.quantize(model, EVERYTHING, [batch])
    tokens = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > batch["input_ids"].shape[1]


def test_exports_into_one_graph() -> None:
    model, batch = made("torch_encoder")
    octavo.quantize(model, EVERYTHING, [batch])
    program = torch.export.export(model, (batch,))
    calls = [node for node in program.graph.nodes if "octavo.fake_quantize" in str(node.target)]
    assert calls
    assert torch.equal(program.module()(batch), model(batch))


def test_quantizing_twice_is_refused() -> None:
    model, batch = made("bert")
    octavo.quantize(model, "fp8", [batch])
    with pytest.raises(UserError, match=r"octavo\.strip"):
        octavo.quantize(model, "fp8", [batch])


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model, batch = made("bert")
    state = tree(model)
    with pytest.raises((RuntimeError, IndexError)):
        octavo.quantize(model, "fp8", [batch, {"input_ids": torch.full((1, 4), 10_000)}])
    assert tree(model) == state
    assert not any(isinstance(m, Quantizer) for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_in_the_data_names_the_quantizer() -> None:
    model, batch = made("vit")
    batch = {"pixel_values": torch.full_like(batch["pixel_values"], float("nan"))}
    with pytest.raises(UserError, match=r"patch_embeddings\.projection\.input_quantizer.*nan"):
        octavo.quantize(model, "fp8", [batch])


def test_a_layer_without_data_stays_off_and_is_told(tmp_path) -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model, batch = Branches(), torch.randn(4, 8)
    run = octavo.quantize(model, "fp8", [batch])
    assert any(
        "unused.input_quantizer" in warning and "no calibration data" in warning for warning in run.record.warnings
    )
    simulated = outputs(model, batch)
    octavo.save(run, tmp_path / "run")
    loaded = octavo.load(tmp_path / "run", Branches(), sample=batch)
    assert torch.equal(outputs(loaded.model, batch), simulated)


def test_a_static_recipe_without_data_is_refused_before_any_change() -> None:
    model, _ = made("bert")
    state = tree(model)
    with pytest.raises(UserError, match="give calibration data"):
        octavo.quantize(model, "int8")
    assert tree(model) == state


@pytest.mark.parametrize("kind", ["list", "loader", "generator", "function"])
def test_data_come_in_many_forms(kind: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 16)
    forms = {
        "list": lambda: [rows[:4], rows[4:]],
        "loader": lambda: torch.utils.data.DataLoader(rows, batch_size=4),
        "generator": lambda: (part for part in rows.split(4)),
        "function": lambda: lambda model: [model(part) for part in rows.split(4)],
    }
    layer = torch.nn.Sequential(torch.nn.Linear(16, 4))
    octavo.quantize(layer, "int8", forms[kind]())
    assert torch.equal(layer[0].input_quantizer.scale, rows.abs().max() / 127)


def test_weights_are_looked_at_once(monkeypatch) -> None:
    from octavo.nn.quantizer import WeightQuantizer

    looks = []
    original = WeightQuantizer.find_range
    monkeypatch.setattr(
        WeightQuantizer, "find_range", lambda self, *given: looks.append(self.name) or original(self, *given)
    )
    model, batch = made("bert")
    octavo.quantize(model, "int8", [batch] * 3)
    assert len(looks) == len(set(looks)) == 13


def test_norms_are_not_quantized_by_any_preset() -> None:
    model, batch = made("bert")
    run = octavo.quantize(model, EVERYTHING, [batch])
    assert not [name for name in run.door.quantizer_names() if "LayerNorm" in name]


def test_a_subclass_with_its_own_forward_is_looked_into_and_can_be_registered() -> None:
    from octavo.nn.layers import through
    from octavo.spec.facts import Slot

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    class QuantDoubled(Doubled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = through(self, Slot.INPUT, 2 * x)
            return torch.nn.functional.linear(x, through(self, Slot.WEIGHT, self.weight), self.bias)

    model = torch.nn.Sequential(Doubled(8, 8), torch.nn.Linear(8, 4))
    batch = torch.randn(4, 8)
    assert "octavo.register" in octavo.plan(model, "fp8").decision("0").why  # without a sample nobody looks inside
    assert set(octavo.plan(model, "fp8", sample=batch).decision("0").scheme) == {Slot.WEIGHT, Slot.INPUT}
    octavo.register(Doubled, QuantDoubled, slots=("weight", "input"))
    before = outputs(model, batch)
    run = octavo.quantize(model, "fp8", [batch])
    assert "0.weight_quantizer" in run.door.quantizer_names()
    assert 0.95 < float(torch.cosine_similarity(outputs(model, batch), before, dim=0)) < 1


def test_a_tied_head_follows_its_embedding() -> None:
    model, _batch = made("llama")
    recipe = Recipe("embedding", ()).quantize("*embed_tokens", weight="int8-channel")
    octavo.quantize(model, recipe)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer


def test_the_most_sensitive_quantizer_comes_first() -> None:
    from octavo.search.sensitivity import rank_quantizers

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    batch = torch.randn(32, 16)
    before = outputs(model, batch)
    recipe = Recipe("bad", ()).quantize("*", weight="int8-channel").quantize("1", weight="int2-tensor")
    run = octavo.quantize(model, recipe)
    error = lambda: float((outputs(model, batch) - before).norm())  # noqa: E731
    ranked = rank_quantizers(run.door, error, higher_is_better=False)
    assert ranked[0].quantizer == "1.weight_quantizer"
    assert ranked[0].cost > 10 * ranked[1].cost


class ManyRows(torch.nn.Module):
    """Goes elsewhere with many rows, or wants many."""

    def __init__(self, *, refuses_few: bool) -> None:
        super().__init__()
        self.few, self.many, self.refuses_few = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), refuses_few

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.refuses_few:
            x = x.view(32, 8)
        return self.few(x) if len(x) < 32 else self.many(x)


@pytest.mark.parametrize("refuses_few", [False, True])
def test_the_whole_batch_is_looked_at_where_a_few_rows_do_not_show_everything(refuses_few: bool) -> None:
    model = ManyRows(refuses_few=refuses_few)
    run = octavo.quantize(model, "int8", [torch.randn(32, 8)])
    (many,) = [decision for decision in run.plan.decisions if decision.site.name == "many"]
    assert not many.site.unreached
    assert many.site.macs == 32 * 64


def test_a_few_rows_are_enough_to_see_a_plain_model() -> None:
    rows: list[int] = []
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    octavo.quantize(model, "int8", [torch.randn(32, 8)] * 2)
    assert rows == [4, 32, 32]
