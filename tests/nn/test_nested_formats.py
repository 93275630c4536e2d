"""Formats whose scales have scales, in a model: what is calibrated, what is searched, what is kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import UserError
from octavo.nn.quantizer import ActivationQuantizer, WeightQuantizer
from octavo.numerics.qtensor import QTensor, fake_quantize
from octavo.spec.formats import tensor_format
from octavo.spec.recipe import Recipe, read_recipe


def made() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 64)


def recipe(weight: str, slots: str = "") -> Recipe:
    """Both as a recipe file writes a slot's value."""
    return read_recipe(f"rules: [{{select: 'operation:linear', scheme: {{weight: {weight}{slots}}}}}]", "mine.yaml")


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 256, generator=generator) for _ in range(3)]


def test_the_outer_scale_of_an_input_is_calibrated_and_group_scales_are_found_per_call() -> None:
    model, data = made(), batches()
    octavo.quantize(model, recipe("nvfp4", ", input: nvfp4"), data)
    quantizer = model.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    assert torch.equal(quantizer.scale, max(x.abs().max() for x in data) / 2688)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)) * 3
    assert torch.equal(quantizer(x), fake_quantize(x, tensor_format("nvfp4"), outer_scale=quantizer.scale))


def test_a_percentile_of_the_input_may_calibrate_it() -> None:
    model = made()
    wanted = ", input: {format: nvfp4, observer: percentile, percentile: 99.0}"
    octavo.quantize(model, recipe("nvfp4", wanted), batches())
    assert model.input_quantizer.scale < max(x.abs().max() for x in batches()) / 2688


def test_a_dynamic_input_has_no_scale_and_needs_no_data() -> None:
    model = made()
    octavo.quantize(model, recipe("mxfp4", ", input: mxfp4"))
    x = batches()[0]
    assert model.input_quantizer.scale is None
    assert torch.equal(model.input_quantizer(x), fake_quantize(x, tensor_format("mxfp4")))


@pytest.mark.parametrize(
    "name",
    [
        "nvfp4",
        "nvfp4-four-over-six",
        "mxfp4",
        "int4-group64-asymmetric",
        "int4-group64-double-quant",
        "nf4-double-quant",
    ],
)
def test_searched_scales_err_less_and_are_what_is_stored(name: str, tmp_path: Path) -> None:
    errors = {}
    for observer in ("absmax", "mse"):
        model = made()
        before = model.weight.detach().clone()
        run = octavo.quantize(model, recipe(f"{{format: {name}, observer: {observer}}}"))
        quantizer = model.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        rounded = quantizer(model.weight).detach()
        assert torch.equal(quantizer.codes(model.weight).dequantize(), rounded)
        errors[observer] = (rounded - before).norm()
    assert errors["mse"] < errors["absmax"]
    octavo.save(run, tmp_path / "run")
    loaded = octavo.load(tmp_path / "run", made())
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    assert octavo.verify(tmp_path / "run", run).agrees


def test_searched_over_the_full_range_is_never_worse_than_symmetric() -> None:
    errors = []
    for name in ("int4-group64", "int4-group64-full-range"):
        model = made()  # uniform weights, of which a range that is cut at 7/8 of one end costs most
        before = model.weight.detach().clone()
        octavo.quantize(model, recipe(f"{{format: {name}, observer: mse}}"))
        errors.append((model.weight_quantizer(model.weight) - before).norm())
    assert errors[1] < errors[0]


def test_scales_of_scales_of_scales(tmp_path: Path) -> None:
    outer = "{element: e4m3, scale: {element: fp32, scale: null}}"
    scales = f"{{element: e4m3, granularity: {{kind: group, size: 4}}, scale: {outer}}}"
    model = made()
    run = octavo.quantize(
        model, recipe(f"{{format: {{element: e2m1, granularity: {{kind: group, size: 8}}, scale: {scales}}}}}")
    )
    octavo.save(run, tmp_path / "run")
    assert octavo.verify(tmp_path / "run", run).agrees
    x = batches()[0]
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(octavo.load(tmp_path / "run", made()).model(x), expected)
        assert torch.equal(octavo.lower(model)(x), expected)


def test_given_scales_are_kept_at_every_level() -> None:
    model = made()
    octavo.quantize(model, recipe("nvfp4"))
    quantizer = model.weight_quantizer
    before = copy.deepcopy(quantizer.codes(model.weight))
    assert isinstance(before.scale, QTensor)
    quantizer.set_range(before.scale.dequantize() * 1.5, None)
    after = quantizer.codes(model.weight)
    torch.testing.assert_close(after.scale.dequantize(), before.scale.dequantize() * 1.5, rtol=0.07, atol=0)
    quantizer.set_range(before.scale, None)
    assert torch.equal(quantizer.codes(model.weight).codes, before.codes)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = made()
    with torch.no_grad():
        model.weight[3, 7] = torch.inf
    with pytest.raises(UserError, match=r"weight_quantizer.*NaN or inf"):
        octavo.quantize(model, recipe("nvfp4"))
