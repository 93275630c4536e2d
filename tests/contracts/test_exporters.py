"""What every export layout owes, whichever they are: a new one in ``EXPORTERS`` is tested by itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from export.handmade import Handmade, activation_scales, add_attention, add_layer
from octavo.errors import UserError
from octavo.export.base import EXPORTERS
from octavo.export.run import write_run
from octavo.export.run_files import read_run
from octavo.export.views import dequantized_weights
from octavo.numerics.qtensor import QTensor
from octavo.readers.compare import compare_weights
from octavo.spec.formats import FORMATS
from octavo.spec.records import RunRecord

SHAPES = {
    "linear": ((6, 256), False),
    "linear, tiles": ((256, 128), False),
    "conv": ((4, 16, 2, 4), False),
    "conv_transposed": ((16, 4, 2, 4), True),
    "embedding": ((10, 128), False),
    "linear, inputs first": ((128, 6), True),
}
INPUTS = {
    "no inputs": (None, False),
    "e4m3": ("e4m3-tensor", False),
    "e4m3 per token": ("e4m3-token", True),
    "int8": ("int8-tensor", False),
    "int8 per token": ("int8-token", True),
    "e4m3 in groups": ("e4m3-group128", True),
    "nvfp4": ("nvfp4", False),
    "mxfp4": ("mxfp4", True),
    "mxfp8": ("mxfp8", True),
}
WEIGHTS = FORMATS

pytestmark = pytest.mark.parametrize("layout", EXPORTERS)


@cache
def quantized(operation: str, weight: str) -> QTensor:
    """The same weight in every model; nobody writes to it."""
    made = Handmade()
    shape, is_transposed = SHAPES[operation]
    add_layer(made, "some.layer", shape, WEIGHTS[weight], is_transposed=is_transposed)
    assert made.members[0].weight is not None
    return made.members[0].weight


def model(operation: str, weight: str, inputs: str) -> Handmade:
    made = Handmade()
    shape, is_transposed = SHAPES[operation]
    input_format, is_dynamic = INPUTS[inputs]
    kind = operation.partition(",")[0]
    options = {"operation": kind, "is_transposed": is_transposed, "is_dynamic": is_dynamic}
    known = quantized(operation, weight)
    add_layer(made, "some.layer", shape, WEIGHTS[weight], input_format, quantized=known, **options)  # type: ignore[arg-type]
    add_layer(made, "left.out", (4, 8), None)
    made.kept += [("norm.weight", torch.linspace(0, 1, 16)), ("ids", torch.arange(4))]
    return made


def fits(operation: str, weight: str) -> bool:
    shape, is_transposed = SHAPES[operation]
    first, second, *rest = shape
    width = (first if is_transposed else second) * torch.Size(rest).numel()
    return WEIGHTS[weight].misfit((1, width)) is None


@pytest.mark.parametrize("operation", SHAPES)
def test_what_is_accepted_reads_back_bit_for_bit_and_the_rest_is_refused(
    layout: str, operation: str, tmp_path: Path
) -> None:
    accepted = set()
    for number, (weight, inputs) in enumerate((w, i) for w in WEIGHTS if fits(operation, w) for i in INPUTS):
        made = model(operation, weight, inputs)
        problems = EXPORTERS[layout].problems(made.plan)
        out = tmp_path / str(number)
        if problems:
            assert all("some.layer" in problem for problem in problems)
            if number % 37 == 0:  # writing what was refused fails, too; a sample is enough
                with pytest.raises(UserError, match=r"some\.layer"):
                    EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
                assert not out.exists()
            continue
        accepted.add((weight, inputs))
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=torch.float16)
        found = compare_weights(
            out,
            ((name, value.numpy()) for name, value in dequantized_weights(made)),
            tensors=((name, value.numpy()) for name, value in made.passthrough()),
            activations=activation_scales(made),
        )
        assert found.agrees, (weight, inputs, found)
        assert found.num_weights == 1
        assert found.narrowed == ("left.out.weight", "norm.weight")
    assert accepted, "a layout that holds nothing for this operation should say so in its page"


def test_attention_scales_survive_or_are_refused(layout: str, tmp_path: Path) -> None:
    made = model("linear", "int8-channel", "no inputs")
    add_attention(made, "attention", query="e4m3-tensor", key="e4m3-tensor", softmax="e4m3-tensor")
    if EXPORTERS[layout].problems(made.plan):
        return
    out = EXPORTERS[layout].write(made, made.plan, source_directory=None, out=tmp_path / "out", float_dtype=None)
    weights = ((name, value.numpy()) for name, value in dequantized_weights(made))
    assert compare_weights(out, weights, activations=activation_scales(made)).agrees


def test_the_same_bytes_from_the_model_and_from_its_run(layout: str, tmp_path: Path) -> None:
    made = model("linear", "int8-channel", "no inputs")
    record = RunRecord.of_plan(made.plan)
    write_run(made, made.plan, recipe="", record=record, source_directory=None, out=tmp_path / "run")
    sources = {"model": made, "again": made, "run": read_run(tmp_path / "run")}
    files = {}
    for name, snapshot in sources.items():
        out = tmp_path / name / layout
        EXPORTERS[layout].write(snapshot, made.plan, source_directory=None, out=out, float_dtype=None)
        files[name] = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert files["model"] == files["again"]
    assert files["model"].keys() == files["run"].keys()


def test_an_earlier_checkpoint_is_replaced_and_other_things_are_not(layout: str, tmp_path: Path) -> None:
    made = model("linear", "int8-channel", "no inputs")
    out = tmp_path / "out"
    for _ in range(2):
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    run = tmp_path / "run"
    write_run(made, made.plan, recipe="", record=RunRecord.of_plan(made.plan), source_directory=None, out=run)
    with pytest.raises(UserError, match="holds something else"):
        EXPORTERS[layout].write(made, made.plan, source_directory=None, out=run, float_dtype=None)
    assert (run / "run.json").is_file()
