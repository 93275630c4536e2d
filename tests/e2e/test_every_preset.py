"""What every preset owes, whichever it is: saved, loaded, packed in memory, exported, verified: the same bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import UserError
from octavo.export.base import EXPORTERS
from octavo.nn.extras import INPUT_TRANSFORM, LOW_RANK, InputTransform, LowRank
from octavo.readers.inspect import inspect
from octavo.spec.recipe import Recipe, load_recipe, presets

NAMES = [recipe.name for recipe in presets()]


class Small(nn.Module):
    """Wide enough for tiles of 128; layers that share an input, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(128, 256), nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return self.down(self.up(x) * torch.sigmoid(self.gate(x)))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, 128, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("preset", NAMES)
@torch.no_grad()
def test_nothing_is_lost_on_the_way(preset: str, tmp_path: Path) -> None:
    data = batches()
    run = octavo.quantize(Small(), preset, data)
    expected = run.model(data[0])
    octavo.save(run, tmp_path / "run")
    assert run.record.bytes_after == run.plan.bytes_after
    restored = octavo.load(tmp_path / "run", Small(), sample=data[0])
    assert restored.plan == run.plan
    assert torch.equal(restored.model(data[0]), expected)
    assert octavo.verify(tmp_path / "run", restored, data).agrees
    assert inspect(tmp_path / "run").concerns == ()
    steps = {step.name for step in load_recipe(preset).steps}
    for layout, exporter in EXPORTERS.items():
        if "rotate" in steps and layout != "run":
            with pytest.raises(UserError, match="rotation"):
                octavo.export(tmp_path / "run", tmp_path / layout, layout=layout)
        elif not exporter.problems(run.plan):
            out = octavo.export(tmp_path / "run", tmp_path / layout, layout=layout)
            found = octavo.verify(out, run, data)
            assert found.agrees, (layout, found)
            assert inspect(out).concerns == ()
    packed = octavo.lower(copy.deepcopy(run.model))
    assert torch.equal(packed(data[0]), expected)
    again = octavo.lower(restored.model)
    assert torch.equal(again(data[0]), expected)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.state_dict().values())
    assert stored <= 1.02 * run.plan.bytes_after + 256


def test_a_run_with_attention_quantizers_keeps_the_shapes_of_its_sample_or_asks_for_one(tmp_path: Path) -> None:
    run = octavo.quantize(Small(), "fp8-attention", batches())
    octavo.save(run, tmp_path / "run")
    assert torch.equal(octavo.load(tmp_path / "run", Small()).model(batches()[0]), run.model(batches()[0]))
    (tmp_path / "run" / "sample.json").unlink()
    with pytest.raises(
        UserError, match=r"quantizers at '\(model\)', and this model shows no such place: give a sample"
    ):
        octavo.load(tmp_path / "run", Small())


def test_a_run_without_them_needs_none(tmp_path: Path) -> None:
    run = octavo.quantize(Small(), "nvfp4", batches())
    octavo.save(run, tmp_path / "run")
    assert torch.equal(octavo.load(tmp_path / "run", Small()).model(batches()[0]), run.model(batches()[0]))


def with_extras() -> octavo.Run:
    """NVFP4 with everything that algorithms may leave beside a layer."""
    run = octavo.quantize(Small(), "nvfp4", batches())
    model = run.model
    generator = torch.Generator().manual_seed(2)
    transform = InputTransform(128, -1, 2)
    transform.divide(torch.rand(128, generator=generator) + 0.5)
    transform.rotate(16, torch.device("cpu"))
    for layer in (model.up, model.gate):
        layer.add_module(INPUT_TRANSFORM, transform)
    a, b = torch.randn(4, 256, generator=generator), torch.randn(128, 4, generator=generator)
    model.down.add_module(LOW_RANK, LowRank(a, b))
    scale = InputTransform(256, -1, 1)
    scale.divide(torch.rand(256, generator=generator) + 0.5)
    model.down.add_module(INPUT_TRANSFORM, scale)
    return run


@torch.no_grad()
def test_scales_rotations_and_branches_come_back(tmp_path: Path) -> None:
    data = batches()
    run = with_extras()
    expected = run.model(data[0])
    octavo.save(run, tmp_path / "run")
    restored = octavo.load(tmp_path / "run", Small())
    assert torch.equal(restored.model(data[0]), expected)
    assert restored.model.up.input_transform is restored.model.gate.input_transform
    found = octavo.verify(tmp_path / "run", run, data)
    assert found.agrees, found
    restored.model.down.low_rank.a[0, 0] += 1
    restored.model.up.input_transform.pre_scale[3] += 1
    names = {difference.name for difference in octavo.verify(tmp_path / "run", restored).weights.differences}
    assert names == {"down.low_rank.a", "up.pre_scale", "gate.pre_scale"}
    assert torch.equal(octavo.lower(run.model)(data[0]), expected)


@torch.no_grad()
def test_scales_and_branches_are_exported(tmp_path: Path) -> None:
    data = batches()
    run = with_extras()
    with pytest.raises(UserError, match="layer 'up': the layout has no place for the rotation of its input"):
        octavo.export(run, tmp_path / "out")
    for layer in (run.model.up, run.model.gate):
        layer.input_transform.rotation, layer.input_transform.matrix = 0, None
    out = octavo.export(run, tmp_path / "out")
    found = octavo.verify(out, run, data)
    assert found.agrees, found
    assert found.weights.num_tensors == 3 + 5  # biases; three scales and a branch


@torch.no_grad()
def test_scales_that_a_layout_has_no_place_for_are_folded_or_left(tmp_path: Path) -> None:
    recipe = Recipe("r", ()).quantize("operation:linear", weight="e4m3-tensor", input="e4m3-tensor")
    recipe = recipe.with_steps("smoothquant")
    run = octavo.quantize(Small(), recipe, batches(), layouts=["modelopt"])
    assert all(layer.pre_scale is None for layer in run.door.snapshot().layers())
    assert any("'up': step 'smoothquant' left it alone" in warning for warning in run.record.warnings)
    assert octavo.verify(octavo.export(run, tmp_path / "out"), run, batches()).agrees
    with pytest.raises(UserError, match="no pre_quant_scale under FP8"):
        octavo.export(octavo.quantize(Small(), recipe, batches()), tmp_path / "out")


SMOOTHED = """
name: smoothed
rules:
  - select: operation:linear
    scheme: {weight: int8-channel, input: int8-tensor}
steps: [smoothquant]
"""


@torch.no_grad()
def test_a_scale_that_cannot_be_folded_is_stored_and_exported(tmp_path: Path) -> None:
    data = [batch * torch.linspace(0.1, 20, 128) for batch in batches()]
    (tmp_path / "smoothed.yaml").write_text(SMOOTHED)
    run = octavo.quantize(Small(), tmp_path / "smoothed.yaml", data)
    octavo.save(run, tmp_path / "run")
    assert torch.equal(octavo.load(tmp_path / "run", Small()).model(data[0]), run.model(data[0]))
    found = octavo.verify(octavo.export(tmp_path / "run", tmp_path / "out"), run, data)
    assert found.agrees, found
    assert "up.pre_scale" in {row.name for row in inspect(tmp_path / "out").rows}
