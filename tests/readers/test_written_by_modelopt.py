"""A checkpoint of block formats that ModelOpt 0.47's export functions wrote (benchmarks/peers/modelopt_blocks.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.handmade import Handmade, add_layer
from octavo.export.base import EXPORTERS
from octavo.numerics.qtensor import quantize
from octavo.readers.inspect import inspect
from octavo.readers.opening import open_checkpoint
from octavo.spec.formats import tensor_format

THEIRS = Path(__file__).parents[1] / "golden" / "modelopt_blocks"
OURS = {"nvfp4": "nvfp4", "mxfp4": "mxfp4-ceil", "mxfp8": "mxfp8-ceil", "int4": "int4-group32"}


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_our_reader_finds_the_values_that_it_says(name: str) -> None:
    values = load_file(THEIRS / "values.safetensors")[name]
    assert torch.equal(values_in(THEIRS, name), values)


@pytest.mark.parametrize("name", OURS)
def test_our_writer_writes_its_bytes(name: str, tmp_path: Path) -> None:
    """But for blocks of zeros, whose scale may be anything, signs of zero, and ties, which it rounds down in MXFP4."""
    weight = load_file(THEIRS / "values.safetensors")["weight"]
    made = Handmade()
    add_layer(made, name, (4, 64), OURS[name], "mxfp8" if name == "mxfp8" else None, is_dynamic=True)
    object.__setattr__(made.members[0], "weight", quantize(weight, tensor_format(OURS[name])))
    EXPORTERS["modelopt"].write(made, made.plan, source_directory=None, out=tmp_path / "out", float_dtype=None)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(THEIRS / "model.safetensors")
    filled = slice(0, 1 if name == "int4" else 3)  # the last row is zeros; int4 has it in a byte with the third
    for part in (part for part in theirs if part.startswith(f"{name}.")):
        mine, other = ours[part], theirs[part]
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), part
        mine, other = (torch.atleast_1d(tensor.float())[filled] for tensor in (mine, other))
        is_exact = name != "mxfp4" or part.endswith("scale")
        assert not is_exact or torch.equal(mine, other), part
    mine, other = (values_in(path, name) for path in (tmp_path / "out", THEIRS))
    errs_alike = (weight - mine).abs() == (weight - other).abs()
    assert errs_alike.all()
    assert name == "mxfp4" or torch.equal(mine, other)


def values_in(path: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(open_checkpoint(path).weights[f"{name}.weight"].dequantize())


def test_it_is_listed() -> None:
    found = inspect(THEIRS)
    assert found.facts == {"producer": "modelopt 0.47.0", "algorithm": "MIXED_PRECISION"}
    assert {row.name: row.format for row in found.rows} == {
        "nvfp4.weight": "e2m1 groups of 16, scales e4m3 per tensor",
        "mxfp4.weight": "e2m1 groups of 32, scales e8m0",
        "mxfp8.weight": "e4m3 groups of 32, scales e8m0",
        "int4.weight": "int4 groups of 32",
    }
