"""``octavo verify``: every bit counts, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from export.handmade import Handmade, activation_scales, small_fp8
from octavo.export.base import EXPORTERS
from octavo.export.views import dequantized_weights
from octavo.readers.compare import Comparison, compare_weights


@pytest.fixture
def made() -> Handmade:
    return small_fp8()


@pytest.fixture
def out(made: Handmade, tmp_path: Path) -> Path:
    return EXPORTERS["modelopt"].write(
        made, made.plan, source_directory=None, out=tmp_path / "out", float_dtype=torch.bfloat16
    )


def weights(made: Handmade) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, value.numpy().copy()) for name, value in dequantized_weights(made))


def tensors(made: Handmade) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, value.numpy()) for name, value in made.passthrough())


def test_the_same_agrees(made: Handmade, out: Path) -> None:
    found = compare_weights(out, weights(made), tensors=tensors(made), activations=activation_scales(made))
    assert found == Comparison(2, 3, 4, 2 * 128 + 64 + 16 + 5 + 4, narrowed=("head.weight", "norm.weight"))
    assert found.agrees
    assert found.to_json_object()["agrees"] is True


def test_one_bit_is_found(made: Handmade, out: Path) -> None:
    expected = dict(weights(made))
    expected["blocks.0.down.weight"][3, 5] += np.float32(0.25)
    expected["blocks.0.down.weight"][4, 0] += np.float32(1)
    (difference,) = compare_weights(out, expected.items()).differences
    assert (difference.name, difference.num_different, difference.max_abs) == ("blocks.0.down.weight", 2, 1.0)
    assert difference.first == (3, 5)
    assert difference.text.startswith("at [3, 5] the files hold ")


def test_a_sign_of_zero_is_a_bit_too(made: Handmade, out: Path) -> None:
    kept = dict(tensors(made))
    kept["norm.weight"] = np.zeros(16, np.float32)
    made.kept[1] = ("norm.weight", -torch.zeros(16))
    kept["norm.weight"][0] = -0.0
    again = EXPORTERS["modelopt"].write(made, made.plan, source_directory=None, out=out, float_dtype=None)
    (difference,) = compare_weights(again, weights(made), tensors=kept.items()).differences
    assert (difference.max_abs, difference.num_different, difference.first) == (0.0, 15, (1,))


def test_names_that_are_missing_and_names_nobody_expected(made: Handmade, out: Path) -> None:
    expected = dict(weights(made))
    expected["other.weight"] = expected.pop("blocks.0.up.weight")
    kept = dict(tensors(made))
    kept["bias"] = kept.pop("norm.weight")
    scales = activation_scales(made)
    scales["other.input_quantizer"] = scales.pop("blocks.0.up.input_quantizer")
    found = compare_weights(out, expected.items(), tensors=kept.items(), activations=scales)
    assert found.missing == ("other.weight", "bias", "other.input_quantizer")
    assert found.extra == ("blocks.0.up.weight", "norm.weight", "blocks.0.up.input_quantizer")
    assert not found.agrees


def test_another_shape(made: Handmade, out: Path) -> None:
    expected = {name: value.T for name, value in weights(made)}
    found = compare_weights(out, expected.items())
    assert found.differences[0].text == "the files hold shape (8, 16), the simulation (16, 8)"


def test_a_simulation_in_a_narrower_dtype(made: Handmade, out: Path) -> None:
    halves = ((name, value.to(torch.float16).numpy()) for name, value in dequantized_weights(made))
    assert compare_weights(out, halves).agrees


def test_another_activation_scale(made: Handmade, out: Path) -> None:
    scales = {name: 2 * value for name, value in activation_scales(made).items()}
    found = compare_weights(out, weights(made), activations=scales)
    assert len(found.differences) == 4
    assert found.differences[0].text == "at [] the files hold 0.03125, the simulation 0.0625"
