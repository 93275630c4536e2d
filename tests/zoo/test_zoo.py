"""Models of many architectures: nothing uncounted, nothing inert, nothing left behind. ``table.py`` lists them."""

from __future__ import annotations

import pytest
import torch

import octavo
from octavo.spec.coverage import State
from octavo.spec.steps import make_step
from zoo.battery import COARSE, anatomy, bits, excused, inert, outputs, same_bits
from zoo.table import ZOO, made

QUICK = ("llama", "gpt_oss", "bert", "vit", "lstm_tagger")


def _case(name: str) -> object:
    marks = [pytest.mark.slow] * (name not in QUICK)
    return pytest.param(name, marks=marks)


every_model = pytest.mark.parametrize("name", list(map(_case, ZOO)))


def test_there_are_as_many_architectures_as_promised() -> None:
    assert len(ZOO) >= 45


@every_model
def test_rotations_in_weights_keep_what_a_model_computes(name: str) -> None:
    model, batch = made(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # scales of norms that are all 1 would prove nothing
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)
    before, rotate = outputs(model, batch), make_step("rotate", {"where": ["residual", "heads"], "block": "whole"})
    run = octavo.quantize(model, octavo.load_recipe("int8-weight-only").with_steps(rotate), [batch])
    with run.door.disabled(lambda quantizer: True):
        assert (outputs(model, batch) - before).norm() < 1e-4 * before.norm()
    assert sum(warning.startswith("rotate: ") for warning in run.plan.warnings) >= 2


@every_model
def test_a_model_is_covered_and_comes_back(name: str) -> None:
    model, batch = made(name)
    before, shape, tensors = outputs(model, batch), anatomy(model), bits(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    run = octavo.quantize(model, COARSE, [batch])

    rows = run.plan.coverage()
    assert sum(row.num_parameters for row in rows) == num_parameters
    assert sum(row.macs or 0 for row in rows) == sum(d.site.macs or 0 for d in run.plan.decisions)
    assert all(row.reason for row in rows)
    quantized = sum(row.num_parameters for row in rows if row.state is State.QUANTIZED)
    assert quantized >= 0.9 * num_parameters

    planned, there = {q for q, _ in run.plan.quantizers()}, set(run.door.quantizer_names())
    told = "\n".join(run.record.warnings)
    assert all(f"'{quantizer}' stays off" in told for quantizer in planned - there)
    with run.door.disabled(lambda quantizer: True):
        assert torch.allclose(outputs(model, batch), before, rtol=1e-4, atol=1e-5)
    assert [quantizer for quantizer in inert(run.door, batch) if not excused(name, run, quantizer)] == []

    octavo.strip(model)
    assert anatomy(model) == shape
    assert same_bits(tensors, bits(model))
    assert torch.equal(outputs(model, batch), before)
