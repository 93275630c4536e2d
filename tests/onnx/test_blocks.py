"""Steps of a recipe on a graph: the same algorithms, fed by onnxruntime, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hand_made_graphs import add, empty, finish, initializer
from octavo import pipeline
from octavo.errors import UserError
from octavo.numerics.qtensor import fake_quantize, quantize
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.onnx.blocks import GraphBlock
from octavo.pipeline.runs import door_on_sample
from octavo.sources import LoadedModel, open_model
from octavo.spec.facts import Slot
from octavo.spec.recipe import Recipe, read_recipe
from octavo.spec.resolve import resolve

WIDTH = 64


def graph(path: Path, num_layers: int = 3) -> Path:
    """Norm, two products with a ReLU between them, and a residual sum; some of its channels 50 times as large."""
    rng = np.random.default_rng(0)
    model = empty(("x", ["n", WIDTH]))
    g, value = model.graph, model.graph.inputs[0]
    for index in range(num_layers):
        gamma = np.ones(WIDTH, np.float32)
        gamma[:: WIDTH // 4] = 50.0
        scale, shift = initializer(g, f"{index}.norm.weight", gamma), initializer(g, f"{index}.norm.bias", 0 * gamma)
        normed = add(g, "LayerNormalization", value, scale, shift, axis=-1)
        up = (rng.standard_normal((WIDTH, 128)) / 8 / gamma[:, None]).astype(np.float32)
        down = (rng.standard_normal((128, WIDTH)) / 12).astype(np.float32)
        hidden = add(g, "Relu", add(g, "MatMul", normed, initializer(g, f"{index}.up.weight", up)))
        value = add(g, "Add", value, add(g, "MatMul", hidden, initializer(g, f"{index}.down.weight", down)))
    finish(model, value)
    model.opset_imports.pop("octavo")
    ir.save(model, path)
    return path


X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
DATA = [{"x": X[:32]}, {"x": X[32:]}]


def output(model: LoadedModel) -> Tensor:
    (value,) = model.model(X).values()
    return value


def error(path: Path, recipe: str) -> float:
    reference = output(open_model(path))
    model = open_model(path)
    pipeline.quantize(model, read_recipe(recipe, "r.yaml"), DATA)
    return float((output(model) - reference).square().mean() / reference.square().mean())


def test_scales_are_folded_into_the_norm_and_help(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    assert error(path, "extends: int8\nsteps: [{smoothquant: {alpha: 0.5}}]") < 0.3 * error(path, "extends: int8")


def test_a_scale_that_no_norm_takes_in_stays_in_front_of_the_layer(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    recipe = "extends: int8\nsteps: [{smoothquant: {alpha: 0.5}}]"
    run = pipeline.quantize(open_model(path), read_recipe(recipe, "r.yaml"), DATA)
    scales = dict(run.door.simulated_extras())
    assert scales.keys() == {f"{index}.down.pre_scale" for index in range(3)}
    assert run.plan.decision("0.down").beside.num_scales == 128
    with run.door.disabled(lambda name: True):
        assert torch.allclose(output(run.loaded), output(open_model(path)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("inputs", ["quantized", "unquantized"])
def test_gptq_beats_rounding(tmp_path: Path, inputs: str) -> None:
    path = graph(tmp_path / "g.onnx")
    plain = "rules: [{select: 'operation:linear', scheme: {weight: int4-group32}}]"
    assert error(path, f"{plain}\nsteps: [gptq]\ncalibration: {{inputs: {inputs}}}") < 0.8 * error(path, plain)


def test_what_steps_wrote_is_in_the_run_and_in_the_file(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    recipe = read_recipe("extends: int8\nsteps: [{smoothquant: {alpha: 0.5}}, gptq]", "r.yaml")
    run = pipeline.save(pipeline.quantize(open_model(path), recipe, DATA), tmp_path / "run")
    again = pipeline.load(tmp_path / "run")
    assert torch.equal(output(again.loaded), output(run.loaded))
    out = pipeline.export(run, tmp_path / "onnx", layout="onnx")
    assert pipeline.verify(out, run, DATA).agrees
    before = path.read_bytes()
    run.door.strip()
    assert path.read_bytes() == before
    assert torch.equal(output(run.loaded), output(open_model(path)))


def test_statistics_are_those_of_what_the_layers_read(tmp_path: Path) -> None:
    loaded = open_model(graph(tmp_path / "g.onnx"))
    door = door_on_sample(loaded, {"x": X})
    plan = resolve(read_recipe("extends: int8", "r.yaml"), door.facts(), "")
    door.prepare(plan)
    read: dict[str, Tensor] = {}
    with Store() as store:
        walk = door.walk(DATA, store, is_quantized=False, keeps_unquantized=False)
        layers: list[str] = []
        for block in walk:
            assert isinstance(block, GraphBlock)
            block.gather(frozenset({Need.GRAM}))
            for name in block.layers():
                layers.append(name)
                statistics = block.statistics(name)
                assert statistics.count == len(X)
                assert statistics.gram is not None
                read[name] = statistics.gram
            block.settle()
            block.advance()
    assert layers == [f"{i}.{part}" for i in range(3) for part in ("up", "down")]
    normed = torch.nn.functional.layer_norm(X, (WIDTH,)) * torch.where(torch.arange(WIDTH) % 16 == 0, 50.0, 1.0)
    assert torch.allclose(read["0.up"], normed.T @ normed, rtol=1e-3, atol=1e-1)
    assert set(door.quantizer_names()) == {name for name, _ in plan.quantizers()}
    assert all(Slot.INPUT in layer.activations for layer in door.snapshot().layers())


def test_what_is_gathered_again_is_what_layers_meet_by_then(tmp_path: Path) -> None:
    door = door_on_sample(open_model(graph(tmp_path / "g.onnx")), {"x": X})
    door.prepare(resolve(read_recipe("extends: int4-group32", "r.yaml"), door.facts(), ""))
    with Store() as store:
        block = next(iter(door.walk(DATA, store, is_quantized=True, keeps_unquantized=True)))
        block.gather(frozenset({Need.GRAM, Need.CROSS, Need.UNROUNDED}))
        before = block.read_weight("0.up")
        assert block.statistics("0.down").cross is None
        fixed = quantize(before, block.weight_spec("0.up").format)
        block.fix_weight("0.up", fixed)
        block.gather_again(["0.down"])
        found = block.statistics("0.down")
        assert torch.equal(block.read_weight("0.up"), before)
    normed = torch.nn.functional.layer_norm(X, (WIDTH,)) * torch.where(torch.arange(WIDTH) % 16 == 0, 50.0, 1.0)
    full, live = ((normed @ weight.T).relu() for weight in (before, fixed.dequantize()))
    assert torch.allclose(found.gram, live.T @ live, rtol=1e-3, atol=1e-2)
    assert torch.allclose(found.cross, full.T @ live, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(found.cross, found.gram, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("preset", ["int8", "int8-dynamic"])
def test_inputs_are_told_as_their_quantizers_will_round_them(tmp_path: Path, preset: str) -> None:
    door = door_on_sample(open_model(graph(tmp_path / "g.onnx")), {"x": X})
    door.prepare(resolve(read_recipe(f"extends: {preset}", "r.yaml"), door.facts(), ""))
    with Store() as store:
        block = next(iter(door.walk(DATA, store, is_quantized=False, keeps_unquantized=False)))
        block.gather(frozenset({Need.GRAM}))
        block.gather_again(block.layers(), rounded=True)
        found, spec = block.statistics("0.up"), block.input_spec("0.up")
    assert spec is not None
    rows = torch.nn.functional.layer_norm(X, (WIDTH,)) * torch.where(torch.arange(WIDTH) % 16 == 0, 50.0, 1.0)
    rounded = fake_quantize(rows, spec.format)
    assert torch.allclose(found.gram, rounded.T @ rounded, rtol=1e-3, atol=1e-1)
    assert torch.allclose(found.cross, rows.T @ rounded, rtol=1e-3, atol=1e-1)
    assert not torch.allclose(found.cross, rows.T @ rows, rtol=1e-3, atol=1e-1)
    assert torch.allclose(found.amax, rows.abs().amax(0))


@pytest.mark.parametrize("inputs", ["quantized", "unquantized"])
def test_layers_make_up_for_those_before_them(tmp_path: Path, inputs: str) -> None:
    path = graph(tmp_path / "g.onnx")
    plain = "rules: [{select: 'operation:linear', scheme: {weight: int4-group32}}]"
    options = f"calibration: {{inputs: {inputs}}}"
    steps = "steps: [gptq: {asymmetric: true, sequential: true}]"
    assert error(path, f"{plain}\n{steps}\n{options}") < error(path, f"{plain}\nsteps: [gptq]\n{options}")


def test_padding_is_in_no_sum(tmp_path: Path) -> None:
    """As in torch models: two texts of three and five tokens, of which eight are learned from."""
    model = empty(("x", ["n", 5, WIDTH]), ("attention_mask", ["n", 5]))
    x, mask = model.graph.inputs
    weight = np.random.default_rng(4).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    product = add(model.graph, "MatMul", x, initializer(model.graph, "up.weight", weight))
    column = add(model.graph, "Unsqueeze", mask, initializer(model.graph, "last", np.array([-1], np.int64)))
    finish(model, add(model.graph, "Mul", product, column))
    model.opset_imports.pop("octavo")
    ir.save(model, tmp_path / "g.onnx")
    batch = {"x": X[:10].view(2, 5, WIDTH), "attention_mask": torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    door = door_on_sample(open_model(tmp_path / "g.onnx"), batch)
    door.prepare(resolve(read_recipe("extends: int8", "r.yaml"), door.facts(), ""))
    text = batch["x"][batch["attention_mask"].bool()]
    with Store() as store:
        for block in door.walk([batch], store, is_quantized=False, keeps_unquantized=False):
            block.gather(frozenset({Need.GRAM}))
            for name in block.layers():
                assert block.statistics(name).count == 8
                assert torch.allclose(block.statistics(name).gram, text.T @ text, rtol=1e-3, atol=1e-3)
            block.settle()
            block.advance()


def test_biases_take_out_mean_errors(tmp_path: Path) -> None:
    """A sum behind a product is its bias; inputs here are far from zero, so most of the error is in the means."""
    rng = np.random.default_rng(3)
    model = empty(("x", ["n", WIDTH]))
    weight = (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)
    product = add(model.graph, "MatMul", model.graph.inputs[0], initializer(model.graph, "up.weight", weight))
    zeros = initializer(model.graph, "up.bias", np.zeros(WIDTH, np.float32))
    finish(model, add(model.graph, "Add", product, zeros))
    model.opset_imports.pop("octavo")
    ir.save(model, path := tmp_path / "g.onnx")
    plain = "rules: [{select: 'operation:linear', scheme: {weight: int4-channel}}]"

    def mean_error(recipe: str) -> float:
        reference, quantized = open_model(path), open_model(path)
        pipeline.quantize(quantized, read_recipe(recipe, "r.yaml"), [{"x": X + 3}])
        (before,), (after,) = reference.model(X + 3).values(), quantized.model(X + 3).values()
        return float((after - before).mean(0).abs().max())

    assert mean_error(f"{plain}\nsteps: [bias_correction]") < 1e-4 < 0.05 < mean_error(plain)


def cut_off_and_gone_on(path: Path, recipe: Recipe, kept: Path, monkeypatch: pytest.MonkeyPatch) -> pipeline.Run:
    """A run whose first try ended in the third piece."""
    settle = GraphBlock.settle

    def dying(block: GraphBlock) -> Mapping[str, str]:
        if block.name.startswith("piece 2"):
            raise InterruptedError
        return settle(block)

    with monkeypatch.context() as patch:
        patch.setattr(GraphBlock, "settle", dying)
        with pytest.raises(InterruptedError):
            pipeline.quantize(open_model(path), recipe, DATA, checkpoint=kept)
    return pipeline.quantize(open_model(path), recipe, DATA, checkpoint=kept)


def test_a_walk_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = graph(tmp_path / "g.onnx", num_layers=9)
    recipe = read_recipe("extends: int8\nsteps: [{smoothquant: {alpha: 0.5}}, gptq]", "r.yaml")
    whole = pipeline.save(pipeline.quantize(open_model(path), recipe, DATA), tmp_path / "whole")
    run = cut_off_and_gone_on(path, recipe, tmp_path / "kept", monkeypatch)
    assert "1 blocks were finished before" in caplog.text
    pipeline.save(run, tmp_path / "again")
    assert torch.equal(output(run.loaded), output(whole.loaded))
    for file in ("quantized.safetensors", "layout.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def deviation(path: Path, recipe: str) -> tuple[pipeline.Run, float]:
    """The run, and how far its function in full precision is from the file's."""
    run = pipeline.quantize(open_model(path), read_recipe(recipe, "r.yaml"), DATA)
    with run.door.disabled(lambda name: True):
        return run, float((output(run.loaded) - output(open_model(path))).abs().max() / output(open_model(path)).std())


RULES = "rules: [{select: 'operation:linear', scheme: {weight: int4-group32, input: int8-tensor}}]"
ROTATED = f"{RULES}\nsteps: [BEFORE{{rotate: {{block: SIZE}}}}]"


@pytest.mark.parametrize(("size", "before"), [("32", ""), ("whole", "{smoothquant: {alpha: 0.5}}, ")])
def test_rotations_stand_in_front_of_the_layers(tmp_path: Path, size: str, before: str) -> None:
    path = graph(tmp_path / "g.onnx")
    run, far = deviation(path, ROTATED.replace("SIZE", size).replace("BEFORE", before))
    assert 0 < far < 1e-4
    assert {f"{i}.{part}" for i in range(3) for part in ("up", "down")} == {
        name.removesuffix(".input_rotation") for name, _ in run.door.simulated_extras() if "rotation" in name
    }
    assert run.plan.decision("1.down").beside.rotation == (32 if size == "32" else 128)
    comes_back(run, tmp_path)


def test_low_rank_branches_stand_beside_the_layers(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    plain = "rules: [{select: 'operation:linear', scheme: {weight: int4-group32}}]"
    run, far = deviation(path, f"{plain}\nsteps: [{{svdquant: {{rank: 16}}}}]")
    assert 0 < far < 1e-4
    assert run.plan.decision("0.up").beside.rank == 16
    assert error(path, f"{plain}\nsteps: [{{svdquant: {{rank: 16}}}}]") < 0.7 * error(path, plain)
    comes_back(run, tmp_path)


def comes_back(run: pipeline.Run, tmp_path: Path) -> None:
    """From the run directory, and as a file that means the same."""
    pipeline.save(run, tmp_path / "run")
    again = pipeline.load(tmp_path / "run")
    assert torch.equal(output(again.loaded), output(run.loaded))
    assert pipeline.verify(tmp_path / "run", again, DATA).agrees
    out = pipeline.export(tmp_path / "run", tmp_path / "onnx", layout="onnx")
    found = pipeline.verify(out, again, DATA)
    assert found.agrees, found.to_json_object()


def test_scales_rotations_and_branches_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path / "g.onnx", num_layers=9)
    steps = "steps: [{smoothquant: {alpha: 0.5}}, {rotate: {block: 32}}, {svdquant: {rank: 8}}, gptq]"
    recipe = read_recipe(f"{RULES}\n{steps}", "r.yaml")
    whole = pipeline.quantize(open_model(path), recipe, DATA)
    run = cut_off_and_gone_on(path, recipe, tmp_path / "kept", monkeypatch)
    assert torch.equal(output(run.loaded), output(whole.loaded))


def test_steps_that_learn_by_gradients_are_refused_before_work(tmp_path: Path) -> None:
    recipe = read_recipe(f"{RULES}\nsteps: [learned_rounding]", "r.yaml")
    path = graph(tmp_path / "g.onnx")
    with pytest.raises(
        UserError, match=r"step 'learned_rounding': it learns by gradients, which a graph does not give"
    ):
        pipeline.plan(open_model(path), recipe)
    with pytest.raises(UserError, match="step 'learned_rounding'"):
        pipeline.quantize(open_model(path), recipe, DATA)
