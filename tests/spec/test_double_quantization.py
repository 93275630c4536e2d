"""Double quantization is a matter of formats: the plan knows them, and every other step works with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import octavo
from octavo.numerics.qtensor import fake_quantize
from octavo.spec.double_quantization import doubled, why_not_doubled
from octavo.spec.formats import FORMATS, tensor_format
from octavo.spec.steps import make_step
from octavo.spec.tensor_format import PerGroup


def quantized(fmt: str, *steps: str, **options: object) -> tuple[octavo.Run, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    recipe = octavo.Recipe("mine", ()).quantize("operation:linear", weight=fmt)
    data = [torch.randn(16, 128)]
    return octavo.quantize(model, recipe.with_steps(make_step("double_quantization", options), *steps), data), model


def test_the_plan_counts_the_bits_and_says_what_is_left() -> None:
    run, _ = quantized("int4-group32")
    weight = run.plan.decision("0").weight
    assert weight is not None
    assert weight.format.bits_per_element((256, 128)) == 4 + 8 / 32 + (32 / 256) / 32 + 32 / (256 * 128)
    run, _ = quantized("nvfp4")
    assert any("step 'double_quantization' left it alone: its scales are e4m3" in w for w in run.record.warnings)


@pytest.mark.parametrize("options", [{}, {"scales": "e4m3"}, {"scales": "int8", "centre": False, "block": 64}], ids=str)
@pytest.mark.parametrize("steps", [(), ("gptq",)], ids=str)
def test_runs_load_and_verify(tmp_path, steps, options) -> None:
    run, model = quantized("int4-group32-asymmetric", *steps, **options)
    octavo.save(run, tmp_path / "run")
    fresh = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(4, 128)
    assert torch.equal(octavo.load(tmp_path / "run", fresh, sample=x).model(x), model(x))
    assert octavo.verify(tmp_path / "run", run, [x]).agrees


@pytest.mark.parametrize(
    "name", [n for n, f in FORMATS.items() if isinstance(f.granularity, PerGroup) and f.scale and not f.is_nested]
)
def test_8_bit_scales_cost_little(name: str) -> None:
    fmt = tensor_format(name)
    if why_not_doubled(fmt):
        assert fmt.scale is not None
        assert fmt.scale.element.bits == 8
        return
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    twice = doubled(fmt, make_step("double_quantization").options)  # type: ignore[arg-type]
    errors = [float((fake_quantize(x, f) - x).square().mean()) for f in (fmt, twice)]
    assert errors[1] < 1.2 * errors[0] + 1e-4
