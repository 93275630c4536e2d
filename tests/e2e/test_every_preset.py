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
from octavo.readers.inspect import inspect
from octavo.spec.recipe import presets

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
    restored = octavo.load(tmp_path / "run", Small(), sample=data[0])
    assert torch.equal(restored.model(data[0]), expected)
    assert octavo.verify(tmp_path / "run", restored, data).agrees
    assert inspect(tmp_path / "run").concerns == ()
    for layout, exporter in EXPORTERS.items():
        if not exporter.problems(run.plan):
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


def test_a_run_with_attention_quantizers_asks_for_a_sample(tmp_path: Path) -> None:
    octavo.save(octavo.quantize(Small(), "fp8-attention", batches()), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"quantizers at '\(model\)', and this model shows no such place: give a sample"
    ):
        octavo.load(tmp_path / "run", Small())


def test_a_run_without_them_needs_none(tmp_path: Path) -> None:
    run = octavo.quantize(Small(), "nvfp4", batches())
    octavo.save(run, tmp_path / "run")
    assert torch.equal(octavo.load(tmp_path / "run", Small()).model(batches()[0]), run.model(batches()[0]))
