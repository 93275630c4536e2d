"""The generated table of formats says what rounding and the exporters say."""

from __future__ import annotations

import pytest
from rich.console import Console

from octavo.cli.catalogue import format_rows
from octavo.errors import UserError
from octavo.report.formats import FormatRow, formats_table
from octavo.spec.formats import FORMATS


@pytest.fixture(scope="module")
def rows() -> dict[str, FormatRow]:
    return {row.name: row for row in format_rows()}


def test_every_format_has_a_row(rows: dict[str, FormatRow]) -> None:
    assert list(rows) == list(FORMATS)
    assert all(0 < row.error_normal < 1.2 and 0 < row.error_heavy < 2 for row in rows.values())


def test_errors_are_those_that_were_published_for_these_formats(rows: dict[str, FormatRow]) -> None:
    """Relative mean squared errors of normal values."""
    published = {"nvfp4": 0.0091, "nvfp4-four-over-six": 0.0076, "mxfp4": 0.0130, "int4-group128": 0.0138}
    for name, error in published.items():
        assert rows[name].error_normal ** 2 == pytest.approx(error, rel=0.04), name
    assert rows["int4-group128-full-range"].error_normal ** 2 == pytest.approx(0.0107, rel=0.04)
    assert rows["int4-group128-asymmetric"].error_heavy ** 2 == pytest.approx(0.0177, rel=0.05)


def test_finer_formats_err_less(rows: dict[str, FormatRow]) -> None:
    for order in (
        ("int2-group32", "int3-group32", "int4-group32", "int8-group32"),
        ("mxfp4", "mxfp6-e3m2", "mxfp6-e2m3", "mxint8"),
        ("int4-channel", "int4-group128", "int4-group64", "int4-group32"),
        ("nvfp4", "nvfp4-four-over-six"),
    ):
        errors = [rows[name].error_normal for name in order]
        assert errors == sorted(errors, reverse=True), order


def test_layouts_are_asked(rows: dict[str, FormatRow]) -> None:
    held = {c.layout: c for c in rows["e4m3-tensor"].carriers}["modelopt"]
    assert "e4m3-tensor" in held.inputs
    assert "unquantized" not in held.inputs
    assert held.runtimes == ("vllm", "tensorrt-llm")
    assert rows["int3-group32-full-range"].carriers == ()
    assert rows["e4m3-token"].carriers == ()


def test_a_pattern_chooses_and_a_wrong_one_is_answered_with_near_names() -> None:
    assert [row.name for row in format_rows("nvfp4*")] == [name for name in FORMATS if name.startswith("nvfp4")]
    with pytest.raises(UserError, match="nvfp4"):
        format_rows("nvfp")


def test_the_table_shows_them() -> None:
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(formats_table(format_rows("nvfp4")))
    assert "e2m1 groups of 16" in capture.get()
    assert "4.500" in capture.get()
    assert "±6" in capture.get()
