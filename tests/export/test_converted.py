"""A run's weights in another format: the same values where the format has them, and a run like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import UserError
from octavo.export.converted import convert_run


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))


def run_of(recipe: str, path: Path) -> Path:
    octavo.save(octavo.quantize(made(), recipe, [torch.ones(2, 128)]), path)
    return path


@pytest.mark.parametrize(("recipe", "to"), [("mxfp4-weight-only", "nvfp4"), ("int4-group32", "int8-group32")])
def test_a_conversion_that_keeps_every_value_gives_the_same_model(recipe: str, to: str, tmp_path: Path) -> None:
    source = run_of(recipe, tmp_path / "source")
    changes = convert_run(source, to, tmp_path / "other")
    assert [change.num_changed for change in changes] == [0, 0]
    before, after = octavo.load(source, made()), octavo.load(tmp_path / "other", made())
    x = torch.randn(4, 128)
    with torch.no_grad():
        assert torch.equal(after.model(x), before.model(x))
    assert {str(spec) for _, spec in after.plan.quantizers()} == {to}
    assert octavo.verify(tmp_path / "other", after).agrees
    assert octavo.verify(tmp_path / "other", before).agrees, "it stands for the weights of the run that it was made of"


def test_what_a_conversion_changed_is_counted_and_nothing_measured_is_taken_over(tmp_path: Path) -> None:
    source = run_of("fp8-block", tmp_path / "source")
    changes = convert_run(source, "int4-group32", tmp_path / "other")
    assert all(0 < c.num_changed <= c.num_values and 0 < c.num_changed_blocks <= c.num_blocks for c in changes)
    assert all(0.05 < c.relative_error < 0.15 for c in changes)
    after = octavo.load(tmp_path / "other", made())
    assert octavo.verify(tmp_path / "other", after).agrees
    assert after.record.metrics == {}
    assert any("converted to int4-group32" in warning for warning in after.record.warnings)
    weights = [after.model[i].weight_quantizer for i in (0, 2)]
    assert all(
        torch.equal(q.codes(m.weight).dequantize(), q(m.weight)) for q, m in zip(weights, after.model[::2], strict=True)
    )


def test_a_weight_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = run_of("fp8-block", tmp_path / "source")
    with pytest.raises(UserError, match="layer '2' cannot become int4-group128: groups of 128 do not divide"):
        convert_run(source, "int4-group128", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        convert_run(tmp_path, "nvfp4", tmp_path / "other")
