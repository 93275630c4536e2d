"""The walk: blocks are found, inputs are the right ones, and a walk without steps calibrates as one pass does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.calibrate.batches import calibrate
from octavo.calibrate.blockwise import calibrate_blockwise
from octavo.errors import UserError
from octavo.nn.door import TorchDoor
from octavo.nn.originals import kept_bytes
from octavo.nn.walk import Walk
from octavo.numerics.block import Block
from octavo.numerics.hadamard import rotate
from octavo.numerics.qtensor import quantize
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve
from octavo.spec.steps import Step, make_step
from zoo.table import made

Model = tuple[nn.Module, Any]


def prepared(model: nn.Module, batch: Any, recipe: str | Recipe = "int8") -> TorchDoor:
    door = TorchDoor(model, "test", batch)
    door.prepare(resolve(load_recipe(recipe), door.facts()))
    return door


def walked(door: TorchDoor, batches: Any, store: Store, **options: bool) -> Walk:
    return door.walk(batches, store, **{"is_quantized": False, "keeps_unquantized": False, **options})


class Nothing:
    """An algorithm that does nothing."""

    def __init__(self, *needs: Need, preserves_function: bool = True) -> None:
        self.needs = frozenset(needs)
        self.preserves_function = preserves_function

    def apply(self, block: Block, layers: Sequence[str]) -> Mapping[str, str]:
        return {}


STEP = make_step("smoothquant")


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("llama", ["model.layers.0"]),
        ("gemma2", ["model.layers.0"]),  # each block has a mask of its own
        ("t5", ["encoder.block.0", "decoder.block.0"]),
        ("clip", ["text_model.encoder.layers.0", "vision_model.encoder.layers.0"]),
        ("resnet", ["resnet.encoder.stages.0"]),
        ("torch_encoder", ["layers.0"]),
        ("lstm_tagger", []),
    ],
)
def test_blocks_are_found_from_the_data_flow(name: str, chains: list[str]) -> None:
    model, batch = made(name)
    door = prepared(model, batch)
    with Store() as store, door.evaluating():
        walk = walked(door, [batch], store)
        assert sorted(chain.members[0].path for chain in walk.structure.chains) == sorted(chains)
        names: list[str] = []
        for block in walk:
            block.gather(frozenset())
            names += block.layers()
            block.settle()
            block.advance()
    expected = {q.rpartition(".")[0] for q in door.quantizer_names() if q.endswith("weight_quantizer")}
    assert sorted(names) == sorted(expected)


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    first = next(v for v in (result.values() if isinstance(result, dict) else [result]) if isinstance(v, Tensor))
    return first.detach().clone()


@pytest.mark.parametrize("name", ["llama", "gemma2", "clip", "t5", "resnet", "bert"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_a_walk_without_steps_calibrates_as_one_pass(name: str, budget: int, tmp_path: Path) -> None:
    model, batch = made(name)
    door = prepared(model, batch)
    plan = resolve(load_recipe("int8"), door.facts())
    calibrate(door, plan, [batch])
    expected = outputs(model, batch)
    model, batch = made(name)
    door = prepared(model, batch)
    with Store(budget, tmp_path) as store, door.evaluating():
        for block in walked(door, [batch, batch], store):
            block.gather(frozenset())
            block.settle()
            block.advance()
    assert torch.equal(outputs(model, batch), expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_quantized", [False, True])
def test_statistics_are_of_the_inputs_that_the_path_gives(is_quantized: bool) -> None:
    model, batch = made("llama")
    door = prepared(model, batch)
    layer = "model.layers.1.mlp.down_proj"
    with Store() as store, door.evaluating():
        for block in walked(door, [batch], store, is_quantized=is_quantized):
            block.gather(frozenset({Need.GRAM}))
            if layer in block.layers():
                gram = block.statistics(layer).gram
                break
            block.settle()
            block.advance()
    if not is_quantized:
        model, batch = made("llama")
    heard: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    outputs(model, batch)
    rows = heard[0].flatten(0, -2).double()
    torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_both_paths_meet_in_the_cross_product() -> None:
    model, batch = made("llama")
    door = prepared(model, batch)
    layer, sums = "model.layers.1.self_attn.q_proj", {}
    with Store() as store, door.evaluating():
        for block in walked(door, [batch], store, is_quantized=True, keeps_unquantized=True):
            block.gather(frozenset({Need.GRAM, Need.CROSS}))
            sums |= {name: block.statistics(name) for name in block.layers()}
            block.settle()
            block.advance()
    drift = sums["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(drift.cross, drift.gram, rtol=1e-3, atol=1e-3)  # nothing is rounded before the first block
    heard: list[Tensor] = []
    for twin in (made("llama")[0], model):
        twin.get_submodule("model.layers.1.input_layernorm").register_forward_hook(lambda m, a, y: heard.append(y))
        outputs(twin, batch)
    full, simulated = (x.flatten(0, -2) for x in heard)
    torch.testing.assert_close(sums[layer].cross, full.T @ simulated, rtol=1e-3, atol=1e-3)


def test_what_is_gathered_again_is_what_layers_meet_by_then() -> None:
    """Behind a rotation, with a weight before it rounded; on the other path nothing is."""
    model, batch = made("llama")
    door = prepared(model, batch)
    up, down = (f"model.layers.0.mlp.{part}_proj" for part in ("up", "down"))
    with Store() as store, door.evaluating():
        block = next(iter(walked(door, [batch], store, is_quantized=True, keeps_unquantized=True)))
        block.gather(frozenset({Need.GRAM, Need.CROSS, Need.UNROUNDED}))
        assert block.statistics(down).cross is None
        block.set_input_rotation(next(group for group in block.groups() if down in group.layers), 16)
        block.fix_weight(up, quantize(block.read_weight(up), block.weight_spec(up).format))
        block.gather_again([down])
        found = block.statistics(down)
    heard: list[Tensor] = []
    twin, rounded = made("llama")[0], made("llama")[0]
    rounded.get_submodule(up).weight.data = model.get_submodule(up).weight.detach()
    for one in (twin, rounded):
        one.get_submodule(down).register_forward_pre_hook(lambda module, args: heard.append(args[0]))
        outputs(one, batch)
    full, live = (rotate(x.flatten(0, -2), 16) for x in heard)
    torch.testing.assert_close(found.gram, live.T @ live, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.cross, full.T @ live, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(full, live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["int8", "int8-dynamic", "nvfp4", "mxfp4", "fp8"])
def test_inputs_are_told_as_their_quantizers_will_round_them(preset: str) -> None:
    model, batch = made("llama")
    door = prepared(model, batch, load_recipe(preset).leave("*down_proj"))
    names = [f"model.layers.0.{part}_proj" for part in ("self_attn.q", "self_attn.o", "mlp.up")]
    with Store() as store, door.evaluating():
        block = next(iter(walked(door, [batch], store)))
        block.gather(frozenset({Need.GRAM}))
        before = {name: block.statistics(name) for name in names}
        block.gather_again(block.layers(), rounded=True)
        found = {name: block.statistics(name) for name in names}
        block.settle()
    heard: dict[str, Tensor] = {}
    twin = made("llama")[0]
    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: heard.update({name: args[0]}))
    outputs(twin, batch)
    for name, x in heard.items():
        rows = x.flatten(0, -2)
        rounded = model.get_submodule(name).input_quantizer(x).flatten(0, -2)
        assert not torch.equal(rows, rounded)
        torch.testing.assert_close(found[name].gram, rounded.T @ rounded, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].cross, rows.T @ rounded, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[name].amax, before[name].amax)


def test_inputs_that_two_layers_round_in_two_ways_are_taken_as_they_are() -> None:
    model, batch = made("llama")
    door = prepared(model, batch, load_recipe("int8-dynamic").leave("*layers.0.self_attn.k_proj.input_quantizer"))
    q = "model.layers.0.self_attn.q_proj"
    with Store() as store, door.evaluating():
        block = next(iter(walked(door, [batch], store)))
        block.gather(frozenset({Need.GRAM}))
        before = block.statistics(q).gram
        block.gather_again(block.layers(), rounded=True)
        assert torch.equal(block.statistics(q).gram, before)
        assert block.statistics(q).cross is None


def test_layers_that_read_one_tensor_are_one_group_with_one_sum() -> None:
    model, batch = made("llama")
    door = prepared(model, batch)
    with Store() as store, door.evaluating():
        block = next(iter(walked(door, [batch], store)))
        block.gather(frozenset({Need.GRAM}))
        groups = {group.layers[0].rpartition(".")[2]: group for group in block.groups()}
        assert [name.rpartition(".")[2] for name in groups["q_proj"].layers] == ["q_proj", "k_proj", "v_proj"]
        assert [name.rpartition(".")[2] for name in groups["gate_proj"].layers] == ["gate_proj", "up_proj"]
        q, v = (block.statistics(f"model.layers.0.self_attn.{part}_proj") for part in "qv")
        assert q.gram is v.gram


def test_factors_fold_into_what_makes_the_tensor() -> None:
    model, batch = made("llama")  # four query heads, two heads of keys and values
    door = prepared(model, batch)
    with Store() as store, door.evaluating():
        block = next(iter(walked(door, [batch], store)))
        block.gather(frozenset())
        folds = {group.layers[0].rpartition(".")[2]: group.fold for group in block.groups()}
    assert {name: fold.producer.rpartition(".")[2] for name, fold in folds.items()} == {
        "q_proj": "input_layernorm",
        "o_proj": "v_proj",
        "gate_proj": "post_attention_layernorm",
        "down_proj": "up_proj",
    }
    width = model.config.head_dim
    heads = torch.arange(4 * width).view(4, width) // width // 2 * width + torch.arange(width)
    assert torch.equal(folds["o_proj"].sources, heads.flatten())


def test_nothing_folds_into_a_norm_that_the_residual_stream_reads() -> None:
    model, batch = made("bert")
    door = prepared(model, batch)
    with Store() as store, door.evaluating():
        blocks = iter(walked(door, [batch], store))
        block = next(b for b in blocks if b.name == "encoder.layer.0")
        block.gather(frozenset())
        folds = {group.layers[0].removeprefix("encoder.layer.0."): group.fold for group in block.groups()}
    assert folds["attention.output.dense"].producer == "encoder.layer.0.attention.self.value"
    assert [name for name, fold in folds.items() if fold is None] == [
        "attention.self.query",
        "intermediate.dense",
        "output.dense",
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma", "bert", "resnet", "phi3", "torch_encoder", "clip"])
def test_scales_keep_the_function(name: str) -> None:
    model, batch = made(name)
    before = outputs(model, batch)
    door = prepared(model, batch)
    generator = torch.Generator().manual_seed(0)
    with Store() as store, door.evaluating():
        for block in walked(door, [batch], store):
            block.gather(frozenset({Need.GRAM}))
            for group in block.groups():
                scale = torch.rand(group.num_channels, generator=generator) * 4 + 0.25
                if block.statistics(group.layers[0]).count:
                    block.set_pre_scale(group, group.tie(scale))
            block.settle()
            block.advance()
    with door.disabled(lambda quantizer: True):
        after = outputs(model, batch)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["int8", "int4-group32", "nvfp4", "nf4-double-quant"])
def test_codes_that_are_fixed_stay(recipe: str, dtype: torch.dtype) -> None:
    if recipe == "int4-group32":
        chosen = Recipe("r", ()).quantize("operation:linear", weight="int4-group32")
    else:
        chosen = load_recipe(recipe)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype).eval()
    batch = torch.randn(6, 128, dtype=dtype)
    door = prepared(model, batch, chosen)
    given = {}
    with Store() as store, door.evaluating():
        for block in walked(door, [batch], store, is_quantized=True):
            block.gather(frozenset())
            for layer in block.layers():
                weight = block.read_weight(layer).float() * 0.7 + 0.001  # not what rounding would have found
                given[layer] = quantize(weight, block.weight_spec(layer).format)
                block.fix_weight(layer, given[layer])
                with pytest.raises(UserError, match=f"layer '{layer}': its weight is rounded already"):
                    block.write_weight(layer, weight)
            block.settle()
            block.advance()
    for layer in door.snapshot().layers():
        assert torch.equal(layer.weight.codes, given[layer.name].codes)
        assert torch.equal(layer.weight.dequantize(), given[layer.name].dequantize())
        simulated = model.get_submodule(layer.name)._weight()
        assert torch.equal(simulated, given[layer.name].dequantize(dtype))


def test_a_step_that_breaks_its_promise_is_refused_by_name() -> None:
    class Breaks(Nothing):
        def apply(self, block: Block, layers: Sequence[str]) -> Mapping[str, str]:
            block.write_weight(layers[0], block.read_weight(layers[0]) * 1.1)
            return {}

    model, batch = made("llama")
    door = prepared(model, batch)
    with pytest.raises(UserError, match=r"'smoothquant' should keep the function of block 'model.layers.0'.*q_proj"):
        run_steps(door, [(STEP, Breaks())], [batch])


def run_steps(door: TorchDoor, steps: list[tuple[Step, Any]], batches: Any) -> Any:
    plan = resolve(load_recipe("int8"), door.facts())
    return calibrate_blockwise(door, plan, steps, batches, is_quantized=True)


def test_errors_of_blocks_are_those_of_their_outputs() -> None:
    model, batch = made("llama")
    recipe = Recipe("r", ()).quantize("operation:linear", weight="int4-channel")
    recipe = recipe.with_steps(make_step("awq", {"clip": False}), "gptq")
    run = octavo.quantize(model, recipe, [batch])
    heard: list[Tensor] = []
    for twin in (made("llama")[0], model):
        twin.model.layers[0].register_forward_hook(lambda m, a, y: heard.append(y[0] if isinstance(y, tuple) else y))
        outputs(twin, batch)
    full, simulated = heard  # from the same inputs: nothing before the first block is rounded
    error = float((simulated - full).square().sum() / full.square().sum())
    first = next(block for block in run.record.blocks if block.name == "model.layers.0")
    assert first.error == pytest.approx(error, rel=1e-3)
    awq, gptq = first.steps
    assert (awq.name, gptq.name) == ("awq", "gptq")
    assert 0 < awq.error < first.plain_error


def test_block_errors_and_what_was_left_alone_are_told() -> None:
    class Leaves(Nothing):
        def apply(self, block: Block, layers: Sequence[str]) -> Mapping[str, str]:
            return {layers[0]: "it is too small"}

    model, batch = made("llama")
    found = run_steps(prepared(model, batch), [(STEP, Leaves())], [batch])
    assert [block.name for block in found.blocks] == ["model.layers.0", "model.layers.1"]
    for block in found.blocks:
        assert 0 < block.error < 0.1
        assert [(step.name, step.error) for step in block.steps] == [("smoothquant", block.plain_error)]
    assert "layer 'model.layers.0.self_attn.q_proj': step 'smoothquant' left it alone: it is too small" in found.notes


def test_steps_that_learn_from_data_are_refused_without() -> None:
    model, _ = made("llama")
    with pytest.raises(UserError, match="step 'smoothquant' learns from the inputs of the layers"):
        octavo.quantize(model, load_recipe("int8-weight-only").with_steps(Step(STEP.options)))


def test_a_pattern_of_a_step_that_matches_nothing_is_refused() -> None:
    model, batch = made("llama")
    recipe = load_recipe("int8").with_steps(make_step("smoothquant", select=("*.c_proj",)))
    with pytest.raises(UserError, match=r"step smoothquant: '\*\.c_proj' matches no layer"):
        octavo.quantize(model, recipe, [batch])


def test_a_function_of_the_model_is_data_too() -> None:
    results = []
    for as_function in (False, True):
        model, batch = made("bert")
        data: Any = (lambda m, batch=batch: [m(**batch), m(**batch)]) if as_function else [batch, batch]
        octavo.quantize(model, load_recipe("int8").with_steps("smoothquant"), data, sample=batch)
        results.append(outputs(model, batch))
    assert torch.equal(*results)


def test_strip_after_steps_needs_the_originals() -> None:
    model, batch = made("llama")
    recipe = load_recipe("int8").with_steps("smoothquant")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost = f"{kept_bytes(model):,} bytes"
    run = octavo.quantize(model, recipe, [batch], keep_original=True)
    assert any(cost in warning for warning in run.plan.warnings)
    octavo.strip(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    octavo.quantize(model, recipe, [batch])
    with pytest.raises(UserError, match="the weights were changed by smoothquant"):
        octavo.strip(model)


def test_padding_is_in_no_sum():
    model, batch = made("bert")
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, ids.shape[1] // 2 :] = 0
    with Store() as store:
        door = prepared(model, {**batch, "attention_mask": mask})
        block = next(iter(walked(door, [{**batch, "attention_mask": mask}], store)))
        block.gather(frozenset({Need.GRAM}))
        found = block.statistics(block.layers()[0])
    assert found.count == int(mask.sum()) < mask.numel()
    # what padding holds changes no sum
    other = torch.where(mask.bool(), ids, (ids + 7) % model.config.vocab_size)
    with Store() as store:
        door = prepared(made("bert")[0], {**batch, "input_ids": other, "attention_mask": mask})
        block = next(iter(walked(door, [{**batch, "input_ids": other, "attention_mask": mask}], store)))
        block.gather(frozenset({Need.GRAM}))
        again = block.statistics(block.layers()[0])
    torch.testing.assert_close(again.gram, found.gram)


class Windows(nn.Module):
    """Convolutions of one tensor that meet it by other windows, as beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.wide, self.narrow, self.deep = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(x))
        out: Tensor = self.wide(hidden) + self.narrow(hidden) * self.deep(hidden)
        return out


def test_runtimes_get_no_scales_in_front_of_convolutions() -> None:
    """They would leave integers there."""
    for target, is_scaled in (("", True), ("onnxruntime-cpu", False)):
        torch.manual_seed(0)
        run = octavo.quantize(Windows().eval(), "int8-smoothquant", [torch.randn(8, 3, 8, 8)], target=target)
        assert any(name.endswith("pre_scale") for name, _ in run.door.simulated_extras()) == is_scaled


def test_convolutions_of_one_tensor_with_other_windows_have_statistics_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Windows().eval(), torch.randn(8, 3, 8, 8)
    run = octavo.quantize(model, "best:int8", [x])
    with torch.no_grad():
        quantized = model(x)
        octavo.save(run, tmp_path / "run")
        assert torch.equal(octavo.load(tmp_path / "run", Windows(), sample=x).model.eval()(x), quantized)
    with Store() as store:
        door = prepared(Windows().eval(), x)
        (block,) = list(walked(door, [x], store))
        block.gather(frozenset({Need.GRAM}))
        assert {group.layers for group in block.groups()} >= {("wide", "deep"), ("narrow",)}
        assert {block.statistics(name).gram.shape[-1] for name in ("wide", "narrow")} == {36, 4}  # type: ignore[union-attr]
