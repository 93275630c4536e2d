"""``nn.MultiheadAttention`` in every combination of its options: torch's own unless something is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo.nn.door import TorchDoor
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.resolve import resolve

QUERIES, KEYS, BATCH, WIDTH, HEADS = 5, 6, 2, 16, 4


class Holder(nn.Module):
    """Calls its attention as a user's module does."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
        return self.attention(query, key, value, **options)


def prepared(attention: nn.MultiheadAttention, *inputs: Any) -> Holder:
    model = Holder(attention).eval()
    door = TorchDoor(model, "holder", inputs)
    door.prepare(resolve(load_recipe("fp8-attention"), door.facts()))
    return model


def assert_equals_torch(attention: nn.MultiheadAttention, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    attention.eval()
    with torch.no_grad():
        expected, expected_weights = attention(*inputs, **options)
        found, found_weights = prepared(attention, *inputs, options)(*inputs, options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found_weights is None) == (expected_weights is None)
    if found_weights is not None:
        torch.testing.assert_close(found_weights, expected_weights, rtol=1e-5, atol=1e-6)


def inputs(batch_first: bool, *, is_batched: bool = True, kdim: int = WIDTH, vdim: int = WIDTH) -> tuple[Tensor, ...]:
    made = [torch.randn(BATCH, n, d) for n, d in ((QUERIES, WIDTH), (KEYS, kdim), (KEYS, vdim))]
    if not is_batched:
        return tuple(t[0] for t in made)
    return tuple(t if batch_first else t.transpose(0, 1) for t in made)


CONSTRUCTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both-extra": {"add_bias_kv": True, "add_zero_attn": True},
    "own-widths": {"kdim": 12, "vdim": 20},
    "no-bias": {"bias": False},
    "own-widths-no-bias-zero": {"kdim": 12, "vdim": 20, "bias": False, "add_zero_attn": True},
}
PADDING = torch.zeros(BATCH, KEYS, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
BLOCKED = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.6
BLOCKED[:, 0] = False
PER_HEAD = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(2))
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": BLOCKED},
    "float": {"attn_mask": PER_HEAD[0]},
    "per-head": {"attn_mask": PER_HEAD},
    "per-head-bool": {"attn_mask": (PER_HEAD > 1) & BLOCKED},
    "padding": {"key_padding_mask": PADDING},
    "float-padding": {"key_padding_mask": PADDING.float() * -5},
    "bool-and-padding": {"attn_mask": BLOCKED, "key_padding_mask": PADDING},
    "per-head-and-padding": {"attn_mask": PER_HEAD, "key_padding_mask": PADDING.float() * -5},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("made", CONSTRUCTED)
def test_with_quantizers_off_it_is_torch_s(made: str, mask: str, batch_first: bool) -> None:
    for need_weights, average in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        arguments = CONSTRUCTED[made]
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **arguments)
        options = {**MASKS[mask], "need_weights": need_weights, "average_attn_weights": average}
        widths = {name: arguments[name] for name in ("kdim", "vdim") if name in arguments}
        assert_equals_torch(attention, inputs(batch_first, **widths), options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "padding", "per-head"])
def test_one_sequence_without_a_batch_axis(mask: str, batch_first: bool) -> None:
    options = dict(MASKS[mask])
    if "key_padding_mask" in options:
        options["key_padding_mask"] = PADDING[0]
    if mask == "per-head":
        options["attn_mask"] = PER_HEAD[:HEADS]
    for need_weights in (True, False):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        assert_equals_torch(attention, inputs(batch_first, is_batched=False), {**options, "need_weights": need_weights})


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_self_attention(need_weights: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert_equals_torch(attention, (x, x, x), {"attn_mask": mask, "is_causal": True, "need_weights": need_weights})


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, QUERIES, WIDTH)
    model = prepared(attention, x, x, x, {})
    for call in (model.attention, nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            call(x, x, x, is_causal=True, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_torch_s_to_that_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).to(dtype).eval()
    tensors = tuple(t.to(dtype) for t in inputs(True))
    with torch.no_grad():
        expected, _ = attention(*tensors, attn_mask=BLOCKED)
        found, _ = prepared(attention, *tensors, {})(*tensors, {"attn_mask": BLOCKED})
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


FORMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "self": ({}, (0, 0, 0)),
    "cross": ({}, (0, 1, 1)),
    "three": ({}, (0, 1, 2)),
    "own-widths": ({"kdim": 12, "vdim": 20}, (0, 3, 4)),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_quantizer_acts_in_every_form(form: str, need_weights: bool) -> None:
    torch.manual_seed(0)
    arguments, chosen = FORMS[form]
    pool = [torch.randn(BATCH, KEYS, d) for d in (WIDTH, WIDTH, WIDTH, 12, 20)]
    model = Holder(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **arguments)).eval()
    batch = (*(pool[k] for k in chosen), {"need_weights": need_weights})
    coarse = Recipe("coarse", ()).quantize("operation:linear", weight="int2-tensor", input="int2-tensor")
    slots = dict.fromkeys(("query", "key", "value", "attention_output"), "int2-tensor")
    run = octavo.quantize(model, coarse.quantize("operation:attention", **slots), [batch])
    names = run.door.quantizer_names()
    projections = 4 if arguments else 2
    assert len(names) == 4 + 2 * projections
    with torch.no_grad(), run.door.disabled(lambda name: True):
        before = model(*batch)[0]
    for quantizer in names:
        with torch.no_grad(), run.door.disabled(lambda other, kept=quantizer: other != kept):
            assert not torch.equal(model(*batch)[0], before), f"{quantizer} does nothing"


def test_all_shapes_multiply_adds_and_parameters_are_accounted() -> None:
    model = Holder(nn.MultiheadAttention(WIDTH, HEADS, kdim=12, vdim=20, batch_first=True)).eval()
    batch = (*inputs(True, kdim=12, vdim=20), {})
    facts = {site.name: site for site in TorchDoor(model, "holder", batch).facts().sites}
    assert facts["attention"].macs == 2 * BATCH * QUERIES * KEYS * WIDTH
    assert facts["attention.k_proj"].macs == BATCH * KEYS * WIDTH * 12
    assert facts["attention.v_proj"].macs == BATCH * KEYS * WIDTH * 20
    assert facts["attention.q_proj"].macs == BATCH * QUERIES * WIDTH * WIDTH
    assert facts["attention.out_proj"].macs == BATCH * QUERIES * WIDTH * WIDTH
    packed = Holder(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
    facts = {site.name: site for site in TorchDoor(packed, "holder", (*inputs(True), {})).facts().sites}
    assert facts["attention.in_proj"].macs == BATCH * (QUERIES + 2 * KEYS) * WIDTH * WIDTH


def test_training_drops_out_as_torch_does() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, QUERIES, WIDTH)
    model = prepared(attention, x, x, x, {}).train()
    torch.manual_seed(1)
    first, _ = model(x, x, x, {})
    assert not torch.allclose(first, model(x, x, x, {})[0])
    model.eval()
    assert torch.equal(model(x, x, x, {})[0], model(x, x, x, {})[0])


def test_a_subclass_with_its_own_forward_is_quantized_behind_it() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    model = Holder(Doubled(WIDTH, HEADS, batch_first=True)).eval()
    batch = (*inputs(True), {})
    with torch.no_grad():
        expected = model(*batch)[0]
        run = octavo.quantize(model, "fp8-attention", [batch])
        assert len(run.door.quantizer_names()) == 8
        for quantizer in run.door.quantizer_names():
            with run.door.disabled(lambda other, kept=quantizer: other != kept):
                assert not torch.equal(model(*batch)[0], expected), quantizer
        with run.door.disabled(lambda name: True):
            assert torch.allclose(model(*batch)[0], expected, atol=1e-5)
    octavo.strip(model)
    assert type(model.attention) is Doubled


def test_probabilities_are_rounded_where_they_are_asked_for_and_where_not() -> None:
    for need_weights in (True, False):
        model = Holder(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
        batch = (*inputs(True), {"need_weights": need_weights})
        with torch.no_grad():
            expected = model(*batch)[0]
            run = octavo.quantize(model, Recipe("p", ()).quantize("attention", softmax="int2-tensor"), sample=batch)
            assert run.door.quantizer_names() == ["attention.softmax_quantizer"]
            assert any("written out" in warning for warning in run.plan.warnings)
            assert not torch.allclose(model(*batch)[0], expected, atol=1e-4)
            with run.door.disabled(lambda name: True):
                assert torch.allclose(model(*batch)[0], expected, atol=1e-6)


def test_packed_keys_with_the_same_query_tensor_are_rounded_once() -> None:
    model = Holder(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).eval()
    x = torch.randn(BATCH, QUERIES, WIDTH)
    octavo.quantize(model, "fp8", [(x, x, x, {})])
    assert torch.equal(model.attention.in_proj.input_quantizer.scale, x.abs().max() / 448)
    assert model.attention.in_proj.input_quantizer.observer.count == x.numel()
