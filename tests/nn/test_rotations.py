"""Rotations in the weights keep what a model computes, whatever its family; where they cannot, the plan says why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from algorithms.outliers import plant
from octavo.errors import UserError
from octavo.nn.norms import norm_kind
from octavo.nn.rotations import block_size, turn
from octavo.nn.streams import HEADS, RESIDUAL, Stream, find_streams, tied_readers
from octavo.nn.ties import untie
from octavo.numerics.hadamard import Turn
from octavo.spec.step_order import fused_rotation
from octavo.spec.steps import make_step

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}
IMAGES = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}


def build(family: str, head: str, **options: Any) -> nn.Module:
    """A model with random weights, the scales and biases of its norms included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"pixel_values": PIXELS} if model.main_input_name == "pixel_values" else {"input_ids": IDS}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]


FAMILIES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama": (lambda: build("Llama", "ForCausalLM", **GROUPED, tie_word_embeddings=False), {RESIDUAL, HEADS}),
    "eager attention": (
        lambda: build("Llama", "ForCausalLM", **GROUPED, attn_implementation="eager"), {RESIDUAL, HEADS}),
    "qk norms": (lambda: build("Qwen3", "ForCausalLM", **GROUPED, head_dim=16), {RESIDUAL, HEADS}),
    "packed projections": (lambda: build("Phi3", "ForCausalLM", **GROUPED), {RESIDUAL, HEADS}),
    "experts": (lambda: build("Mixtral", "ForCausalLM", **GROUPED), {RESIDUAL, HEADS}),
    "norms that add one": (lambda: build("Gemma", "ForCausalLM", **GROUPED, head_dim=16), {RESIDUAL, HEADS}),
    "norms that subtract the mean": (lambda: build("GPT2", "LMHeadModel", **GPT2), {RESIDUAL, HEADS}),
    "images": (lambda: build("ViT", "ForImageClassification", **IMAGES), {RESIDUAL, HEADS}),
    "norms behind blocks": (lambda: build("Gemma2", "ForCausalLM", **GROUPED, head_dim=16), {HEADS}),
    "post-norm": (lambda: build("Bert", "Model", **SMALL), {HEADS}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_turning_keeps_the_function_and_changes_the_weights(name: str) -> None:
    make, expected = FAMILIES[name]
    model = make()
    before, weights = output(model), copy.deepcopy(model.state_dict())
    streams = find_streams(model, lambda: output(model))
    if tied := tied_readers(model, streams):
        untie(model, tied)
        streams = find_streams(model, lambda: output(model))
    chosen = [stream for stream in streams.found if not stream.reason]
    assert {stream.kind for stream in chosen} == expected
    assert len([stream for stream in chosen if stream.kind == HEADS]) == 2
    for stream in chosen:
        turn(model, stream, block_size(stream, "whole", ()))
    assert (output(model) - before).norm() < 1e-5 * before.norm()
    turned = {member.key for stream in chosen for member in stream.members}
    assert all(not torch.equal(model.state_dict()[key], weights[key]) for key in turned if weights[key].ndim > 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build("Bert", "Model", **SMALL), "'embeddings.LayerNorm' writes to it"),
        (lambda: build("Gemma2", "ForCausalLM", **GROUPED, head_dim=16), "post_attention_layernorm' writes to it"),
        (lambda: build("Dinov2", "ForImageClassification", **IMAGES), "multiplied channel by channel in 'dinov2"),
        (lambda: build("Llama", "Model", **GROUPED), "the model returns it"),
    ],
    ids=["post-norm", "norms behind blocks", "layer scale", "no head"],
)
def test_what_cannot_be_rotated_is_in_the_plan_with_its_reason(model: Callable[[], nn.Module], reason: str) -> None:
    built = model()
    recipe = octavo.load_recipe("int8").with_steps(make_step("rotate", {"where": ["residual"]}))
    weights = copy.deepcopy(built.state_dict())
    plan = octavo.plan(built, recipe, sample=inputs(built))
    assert any("cannot be rotated in the weights" in w and reason in w for w in plan.warnings)
    assert all(torch.equal(value, weights[key]) for key, value in built.state_dict().items())


class Net(nn.Module):
    """Two blocks around a residual stream, small enough to be told by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 16), nn.RMSNorm(16), nn.Linear(16, 5)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.last = nn.RMSNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x)
        return self.head(self.last(x + self.down(torch.relu(self.up(self.norm(x))))))


def test_weights_are_what_the_papers_say() -> None:
    """QuaRot, section 4: ``E Q``, ``Q^T W`` for what writes, ``W diag(scale) Q`` for what reads behind a norm."""
    torch.manual_seed(0)
    model = Net()
    was = {key: value.double() for key, value in copy.deepcopy(model.state_dict()).items()}
    ids = torch.arange(20).reshape(4, 5)
    (stream,) = find_streams(model, lambda: model(ids)).of(RESIDUAL)
    turn(model, stream, 16)
    matrix = Turn(16)(torch.eye(16)).double()
    now = {key: value.double() for key, value in model.state_dict().items()}
    close = {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(now["table.weight"], was["table.weight"] @ matrix, **close)
    torch.testing.assert_close(now["down.weight"], matrix.T @ was["down.weight"], **close)
    torch.testing.assert_close(now["down.bias"], was["down.bias"] @ matrix, **close)
    torch.testing.assert_close(now["up.weight"], was["up.weight"] * was["norm.weight"] @ matrix, **close)
    assert torch.equal(now["norm.weight"], torch.ones(16).double())
    assert torch.equal(now["up.bias"], was["up.bias"])


@pytest.mark.parametrize("size", [2, 12, 20, 28, 36, 40, 64, 96])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_turns_are_orthogonal_and_spread(size: int, keeps_mean: bool) -> None:
    matrix = Turn(size, keeps_mean=keeps_mean)(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    if keeps_mean:
        torch.testing.assert_close(matrix.sum(0), torch.ones(size), rtol=0, atol=1e-5)
    elif size > 2:
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5), rtol=0, atol=1e-6)


def test_a_norm_is_known_by_what_it_does() -> None:
    x = torch.randn(8, 32) + 1
    assert norm_kind(nn.RMSNorm(32), x).keeps_mean is False  # type: ignore[union-attr]
    assert norm_kind(nn.LayerNorm(32), x).keeps_mean is True  # type: ignore[union-attr]
    assert norm_kind(nn.Linear(32, 32), x) is None
    assert norm_kind(nn.PReLU(32), x) is None


@pytest.mark.parametrize(
    ("wanted", "width", "groups", "expected"),
    [("whole", 96, [32], 96), ("group", 96, [32, 32], 32), ("group", 96, [32, 0], 96), ("group", 100, [50], 20),
     (16, 96, [], 16), (64, 96, [], 0), ("whole", 7, [], 0)],
)  # fmt: skip
def test_blocks(wanted: int | str, width: int, groups: list[int], expected: int) -> None:
    assert block_size(Stream(RESIDUAL, width, (), {}), wanted, groups) == expected


def tiny_llama(path: Any) -> str:
    build("Llama", "ForCausalLM", **GROUPED, tie_word_embeddings=True).save_pretrained(path)
    return str(path)


BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0).roll(3, 1)}]


@pytest.mark.parametrize("layout", ["modelopt", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_run_whose_rotations_are_all_in_the_weights_is_exported(tmp_path, layout: str) -> None:
    loaded = octavo.open_model(tiny_llama(tmp_path / "model"))
    recipe = octavo.load_recipe("int8").with_steps(make_step("rotate", {"where": ["residual", "heads"]}), "gptq")
    run = octavo.quantize(loaded, recipe, BATCHES, layouts=[layout])
    assert run.plan.untied == ("lm_head.weight",)
    octavo.save(run, tmp_path / "run")
    again = octavo.load(tmp_path / "run")
    assert torch.equal(output(again.model), output(loaded.model))
    assert octavo.verify(tmp_path / "run", again, BATCHES).agrees
    octavo.export(again, tmp_path / "out", layout=layout)
    assert octavo.verify(tmp_path / "out", again, BATCHES).agrees
    if layout == "modelopt":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_ties_and_weights_come_back(tmp_path) -> None:
    loaded = octavo.open_model(tiny_llama(tmp_path / "model"))
    model, before = loaded.model, output(loaded.model)
    recipe = octavo.load_recipe("mxfp4").with_steps(make_step("rotate", {"where": ["residual", "heads", "online"]}))
    octavo.plan(loaded, recipe, sample=BATCHES[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(UserError, match="get a quantized weight"):
        octavo.quantize(loaded, recipe, BATCHES, require_coverage=1.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    run = octavo.quantize(loaded, recipe, BATCHES, keep_original=True)
    rotated = {layer.name for layer in run.door.snapshot().layers() if layer.input_rotation}
    assert rotated == {f"model.layers.{k}.mlp.down_proj" for k in range(2)}
    octavo.strip(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(output(model), before)


def test_outliers_that_norms_make_are_gone(tmp_path) -> None:
    """Their scales move into weights that were small there, and nothing is left of either."""
    reference = build("Llama", "ForCausalLM", **GROUPED, tie_word_embeddings=False)
    planted = copy.deepcopy(reference)
    for layer in planted.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        plant([(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))])
        plant([(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))])
    wanted = output(reference)
    errors = {}
    for where in (("online",), ("residual", "heads", "online")):
        model = copy.deepcopy(planted)
        octavo.quantize(model, octavo.load_recipe("mxfp4").with_steps(make_step("rotate", {"where": where})), BATCHES)
        errors[where] = float((output(model) - wanted).square().mean())
    assert errors["residual", "heads", "online"] < 0.3 * errors["online",]


def test_one_step_rotates_the_whole_model() -> None:
    both = [make_step("rotate", {"where": ["residual"]}), make_step("rotate", {"where": ["heads"]})]
    with pytest.raises(UserError, match="two steps rotate weights"):
        fused_rotation(both)
    with pytest.raises(UserError, match="leave select out"):
        fused_rotation([make_step("rotate", {"where": ["heads"]}, ("*.mlp.*",))])
