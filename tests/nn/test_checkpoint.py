"""A walk that ends in the middle goes on from what it had finished, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from octavo.calibrate import checkpoint
from octavo.calibrate.checkpoint import opened
from octavo.errors import UserError
from octavo.nn.blocks import TorchBlock
from octavo.spec.recipe import Recipe, load_recipe
from octavo.spec.steps import make_step
from zoo.table import made


def recipe_of(weight: str, *steps: str, inputs: str | None = None) -> Recipe:
    scheme = {"weight": weight} | ({"input": inputs} if inputs else {})
    options: dict[str, dict[str, Any]] = {"learned_rounding": {"steps": 4}, "svdquant": {"rank": 4}}
    options |= {"awq": {"clip": False}} if "gptq" in steps else {}
    return (
        Recipe("r", ())
        .quantize("operation:linear", **scheme)
        .with_steps(*(make_step(step, options.get(step)) for step in steps))
    )


class DiedError(Exception):
    """Stands for whatever ends a process."""


def files_of(run: octavo.Run, out: Path, **options: Any) -> dict[str, str]:
    octavo.save(run, out, **options)
    names = ("*.safetensors", "plan.json", "layout.json", "recipe.yaml")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for name in names for p in out.glob(name)}


def quantized(name: str, recipe: Recipe, checkpoint: Path | None = None) -> octavo.Run:
    model, batch = made(name)
    return octavo.quantize(model, recipe, [batch, batch], checkpoint=checkpoint)


def dying_in(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The block of this number, counted from 0, is not settled any more."""
    settle, count = TorchBlock.settle, [0]

    def instead(block: TorchBlock) -> Any:
        count[0] += 1
        if count[0] > number:
            raise DiedError
        return settle(block)

    monkeypatch.setattr(TorchBlock, "settle", instead)


RECIPES = {
    "smoothquant": recipe_of("int8-channel", "smoothquant", inputs="int8-tensor"),
    "awq, gptq": recipe_of("int4-channel", "awq", "gptq"),
    "rotate, svdquant, gptq": recipe_of("nvfp4", "rotate", "svdquant", "gptq", inputs="nvfp4"),
    "gptaq": recipe_of("int4-channel").with_steps(make_step("gptq", {"asymmetric": True, "sequential": True})),
    "residual, gptq": recipe_of("int4-channel").with_steps(
        make_step("rotate", {"where": ["residual", "heads"]}), make_step("gptq")
    ),
    "learned_rounding": recipe_of("int4-channel", "learned_rounding"),
    "nf4": load_recipe("nf4-double-quant").with_steps(make_step("smoothquant")),
    "bias_correction": recipe_of("int4-channel").with_steps(make_step("bias_correction", {"add": True})),
    "hqq": recipe_of("int4-channel-asymmetric", "hqq"),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "awq, gptq"),
        pytest.param("t5", "gptaq", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "awq, gptq", marks=pytest.mark.slow),
        pytest.param("mixtral", "rotate, svdquant, gptq", marks=pytest.mark.slow),
        *(pytest.param("llama", recipe, marks=pytest.mark.slow) for recipe in RECIPES if recipe != "awq, gptq"),
    ],
)
def test_it_ends_with_the_same_bytes(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = quantized(name, RECIPES[recipe])
    with monkeypatch.context() as patch:
        dying_in(patch, 2 if name == "t5" else 1)
        with pytest.raises(DiedError):
            quantized(name, RECIPES[recipe], tmp_path / "kept")
    kept = sorted(path.name for path in (tmp_path / "kept").glob("block-*"))
    assert kept
    again = quantized(name, RECIPES[recipe], tmp_path / "kept")
    assert f"{len(kept)} blocks were finished before" in caplog.text
    assert [b.error for b in again.record.blocks] == [b.error for b in whole.record.blocks]
    assert [len(b.steps) for b in again.record.blocks] == [len(b.steps) for b in whole.record.blocks]
    assert again.record.warnings == whole.record.warnings
    assert files_of(again, tmp_path / "again") == files_of(whole, tmp_path / "whole")
    assert not (tmp_path / "kept").exists(), "removed when the run is written"
    assert again.record.bytes_after == again.plan.bytes_after


def test_what_is_of_something_else_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe, kept = RECIPES["awq, gptq"], tmp_path / "kept"
    quantized("llama", recipe, kept)
    model, batch = made("llama")
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    octavo.quantize(model, recipe, [other, other], checkpoint=kept)
    assert "of another data: starting anew" in caplog.text
    caplog.clear()
    model, _ = made("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    octavo.quantize(model, RECIPES["smoothquant"], [other, other], checkpoint=kept)
    assert "of another model, recipe: starting anew" in caplog.text


def test_a_damaged_file_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = RECIPES["awq, gptq"]
    whole = files_of(quantized("llama", recipe, tmp_path / "kept"), tmp_path / "whole", keep_checkpoint=True)
    block = sorted((tmp_path / "kept").glob("block-*"))[-1]
    block.write_bytes(block.read_bytes()[:100])
    caplog.set_level(logging.WARNING)
    assert files_of(quantized("llama", recipe, tmp_path / "kept"), tmp_path / "again") == whole
    assert f"cannot read {block}" in caplog.text


def test_a_full_disk_does_not_end_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    recipe = RECIPES["awq, gptq"]
    whole = files_of(quantized("llama", recipe), tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert files_of(quantized("llama", recipe, tmp_path / "kept"), tmp_path / "run") == whole
    assert caplog.text.count("No space left on device") == 1


def test_it_touches_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="it holds something else"):
        quantized("llama", RECIPES["awq, gptq"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_work_on_one(tmp_path: Path) -> None:
    with opened(tmp_path / "kept", {}), pytest.raises(UserError, match="another process works on the blocks"):
        quantized("llama", RECIPES["awq, gptq"], tmp_path / "kept")


def test_data_that_is_a_function_has_no_checkpoint(tmp_path: Path) -> None:
    model, batch = made("llama")
    with pytest.raises(UserError, match="what a function feeds is not known beforehand"):
        octavo.quantize(model, RECIPES["awq, gptq"], lambda m: m(**batch), sample=batch, checkpoint=tmp_path / "kept")
