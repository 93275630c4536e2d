"""What a quantized model lives through: copies, casts, files of weights, training, generation, torch's compilers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from nn.models import made, outputs
from octavo.nn.door import TorchDoor
from octavo.nn.quantizer import Mode, Quantizer
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve

PRESETS = ("fp8-attention", "fp8-dynamic", "int8", "int8-dynamic", "int8-weight-only", "nvfp4", "nf4-double-quant")
ASYMMETRIC = Recipe("asymmetric", ()).quantize(
    "operation:linear", weight="int4-group32-asymmetric", input="int8-tensor-asymmetric"
)
GROUPS = Recipe("groups", ()).quantize("operation:linear", weight="int4-group32", input="int8-token")
RECIPES = {**{name: load_recipe(name) for name in PRESETS}, "asymmetric": ASYMMETRIC, "groups": GROUPS}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def quantized(name: str, recipe: str) -> tuple[nn.Module, Any, octavo.Run]:
    model, batch = made(name)
    return model, batch, octavo.quantize(model, RECIPES[recipe], [batch])


@every_recipe
def test_a_state_dict_restores_a_freshly_prepared_model(recipe: str) -> None:
    model, batch, run = quantized("bert", recipe)
    fresh, _ = made("bert")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    TorchDoor(fresh, "bert", batch).prepare(run.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))


@every_recipe
def test_a_file_of_the_state_dict_is_plain_tensors(recipe: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, batch, run = quantized("vit", recipe)
    save_file({key: t.clone() for key, t in model.state_dict().items()}, tmp_path / "state.safetensors")
    fresh, _ = made("vit")
    TorchDoor(fresh, "vit", batch).prepare(run.plan)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(outputs(fresh, batch), outputs(model, batch))


@every_recipe
def test_a_deepcopy_is_independent(recipe: str) -> None:
    model, batch, _ = quantized("llama", recipe)
    simulated = outputs(model, batch)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert not {id(b) for b in twin.buffers()} & {id(b) for b in model.buffers()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outputs(twin, batch), simulated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_recipe
def test_a_cast_keeps_scales_and_computes_in_the_new_dtype(recipe: str, dtype: torch.dtype) -> None:
    model, batch, _ = quantized("bert", recipe)
    before = outputs(model, batch)
    scales = {key: b.clone() for key, b in model.named_buffers() if "_quantizer." in key}
    model.to(dtype)
    for key, buffer in model.named_buffers():
        if key in scales:
            assert buffer.dtype == scales[key].dtype
            assert torch.equal(buffer, scales[key])
    assert all(p.dtype == dtype for p in model.parameters())
    after = outputs(model, batch)
    assert nn.functional.cosine_similarity(before, after, dim=0) > 0.99
    model.float()
    assert {b.dtype for key, b in model.named_buffers() if key.endswith("scale")} <= {torch.float32}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_every_way_to_cast_keeps_scales_in_fp32(cast: str) -> None:
    model, _, _ = quantized("vit", "fp8-attention")
    getattr(model, cast)()
    assert {q.scale.dtype for q in model.modules() if isinstance(q, Quantizer)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_recipe
def test_models_in_half_precision_are_quantized_in_fp32_arithmetic(recipe: str, dtype: torch.dtype) -> None:
    model, batch = made("llama")
    model.to(dtype)
    before = outputs(model, batch)
    run = octavo.quantize(model, RECIPES[recipe], [batch])
    after = outputs(model, batch)
    assert all(q.scale is None or q.scale.dtype == torch.float32 for q in model.modules() if isinstance(q, Quantizer))
    assert nn.functional.cosine_similarity(before, after, dim=0) > 0.95
    run.door.strip()
    assert torch.equal(outputs(model, batch), before)


def test_meta_and_back_is_not_needed_to_move_buffers_along() -> None:
    model, _, _ = quantized("bert", "int8")
    model.to("meta")
    assert all(b.is_meta for b in model.buffers())


def test_replacing_a_weight_in_place_or_by_copy_is_noticed() -> None:
    """A frozen weight is rounded once; a new value must not meet the old rounding."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    octavo.quantize(model, Recipe("w", ()).quantize("*", weight="int8-channel"))
    with torch.no_grad():
        first = model(x)
        model[0].weight.mul_(0.5)
        second = model(x)
        assert not torch.equal(first, second)
        model[0].weight.data = model[0].weight.data * 0.5
        third = model(x)
        assert not torch.equal(second, third)
        model[0].weight_quantizer.scale.mul_(2)
        assert not torch.equal(model(x), third)


def test_training_moves_weights_through_the_rounding() -> None:
    """A few steps of quantization-aware training lower the loss, and evaluation sees the trained weights."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
    target = torch.randn(64, 4)
    octavo.quantize(model, Recipe("qat", ()).quantize("*", weight="int4-channel", input="int8-tensor"), [x])
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        assert float(nn.functional.mse_loss(model(x), target)) < losses[0]


def test_gradients_of_a_quantized_layer_are_those_of_the_written_out_estimate() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(7, 6, requires_grad=True)
    model = nn.Sequential(layer)
    octavo.quantize(model, Recipe("ste", ()).quantize("*", weight="int4-channel", input="int8-tensor"), [x.detach()])
    model(x).square().sum().backward()

    def estimate(t: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
        codes = (t / scale).clamp(-limit - 1, limit)
        return (codes + (codes.round() - codes).detach()) * scale

    weight, other = layer.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    rounded = estimate(weight, layer.weight_quantizer.scale[:, None], 7)
    nn.functional.linear(estimate(other, layer.input_quantizer.scale, 127), rounded, bias).square().sum().backward()
    assert torch.allclose(x.grad, other.grad, atol=1e-5)
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-5)
    assert torch.allclose(layer.bias.grad, bias.grad, atol=1e-5)


def test_gradients_reach_every_parameter_of_a_model() -> None:
    model, batch, _ = quantized("clip", "fp8-attention")
    model.train()
    model(**batch).logits_per_image.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    plain, _ = made("clip")
    plain.train()
    plain(**batch).logits_per_image.sum().backward()
    assert with_gradient == {name for name, p in plain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_generation_is_that_of_repeated_forward_passes(name: str) -> None:
    """With a cache and without: keys and values are rounded after they are stored, by the same static scale."""
    model, batch, _ = quantized(name, "fp8-attention")
    start = batch["input_ids"]
    model.generation_config.eos_token_id = None
    cached = model.generate(start, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(start, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert cached.shape == (2, start.shape[1] + 5)
    assert torch.equal(cached, plain)


def test_sequence_to_sequence_generation_works() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "decoder_input_ids": torch.randint(3, 50, (2, 4))}
    octavo.quantize(model, "fp8-attention", [batch])
    tokens = model.generate(batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 5)


def test_inference_mode_and_autocast_work() -> None:
    model, batch, _ = quantized("bert", "int8")
    expected = outputs(model, batch)
    with torch.inference_mode():
        assert torch.equal(outputs(model, batch), expected)
    assert torch.equal(outputs(model, batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.cosine_similarity(outputs(model, batch), expected, dim=0) > 0.99


def test_two_quantized_models_do_not_disturb_each_other() -> None:
    one, batch, _ = quantized("bert", "int8")
    simulated = outputs(one, batch)
    two, other_batch, run = quantized("bert", "fp8-attention")
    assert torch.equal(outputs(one, batch), simulated)
    run.door.strip()
    assert torch.equal(outputs(one, batch), simulated)
    octavo.strip(one)
    plain, _ = made("bert")
    assert torch.equal(outputs(one, batch), outputs(plain, batch))
    assert torch.equal(outputs(two, other_batch), outputs(plain, batch))


def test_print_shows_what_each_quantizer_does() -> None:
    model, _, _ = quantized("torch_encoder", "fp8-attention")
    text = repr(model)
    assert "e4m3 per tensor, static, quantize" in text
    assert "q_bmm_quantizer" in text


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_save_pretrained_is_refused_everywhere_and_allowed_again_after_strip(name: str, tmp_path: Path) -> None:
    model, _, _ = quantized(name, "int8")
    savers = [m for m in model.modules() if callable(getattr(m, "save_pretrained", None))]
    for module in (*savers, copy.deepcopy(model)):
        with pytest.raises(octavo.UserError, match=r"octavo\.save\(run, path\).*octavo\.strip"):
            module.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    octavo.strip(model)
    model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").is_file()


def test_quantizers_that_were_never_calibrated_stay_off_after_a_load() -> None:
    model, batch = made("bert")
    door = TorchDoor(model, "bert", batch)
    door.prepare(resolve(RECIPES["int8"], door.facts()))
    fresh, _ = made("bert")
    other = TorchDoor(fresh, "bert", batch)
    other.prepare(resolve(RECIPES["int8"], other.facts()))
    fresh.load_state_dict(model.state_dict())
    assert all(q.mode is Mode.OFF for q in fresh.modules() if isinstance(q, Quantizer))
    assert torch.equal(outputs(fresh, batch), outputs(made("bert")[0], batch))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_export_holds_the_simulation(recipe: str, tmp_path: Path) -> None:
    model, batch, _ = quantized("torch_encoder", recipe)
    program = torch.export.export(model, (batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(batch), model(batch))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_in_one_graph_it_is_the_simulation(recipe: str) -> None:
    model, batch, _ = quantized("bert", recipe)
    simulated = outputs(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(outputs(compiled, batch), simulated)
    assert torch.equal(outputs(compiled, batch), simulated)


def test_classes_made_on_the_fly_are_not_pickled_by_name() -> None:
    """A pickle of a simulated model is not promised; that of its state dict is."""
    model, _, _ = quantized("bert", "int8")
    state = pickle.loads(pickle.dumps(model.state_dict()))
    assert state.keys() == model.state_dict().keys()
