"""What ``octavo inspect`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.report.plan_view import DottedName
from octavo.report.terminal import blocks_table
from octavo.report.words import bytes_text, shape_text
from octavo.spec.records import BlockRecord


def render_inspection(inspection: Mapping[str, Any], *, with_entries: bool = True) -> RenderableType:
    """Tables of an inspection.

    Args:
        inspection: ``Inspection.to_json_object()``.
        with_entries: Every entry, not only the sums by format.
    """
    parts: list[RenderableType] = [_title(inspection), _formats(inspection)]
    if with_entries:
        parts += [Text(), _entries(inspection)]
    if inspection["blocks"]:
        parts += [Text(), blocks_table([BlockRecord.model_validate(block) for block in inspection["blocks"]])]
    return Group(*parts, Text(), _concerns(inspection))


def _title(inspection: Mapping[str, Any]) -> Text:
    facts = ", ".join(f"{name} {value}" for name, value in inspection["facts"].items())
    size = f"{inspection['layout']} layout, {bytes_text(inspection['tensor_bytes'])} of tensors"
    return Text.assemble((inspection["path"], "bold"), f"  {size}{'; ' if facts else ''}{facts}\n")


def _formats(inspection: Mapping[str, Any]) -> Table:
    table = _table("kind", "format")
    for name in ("entries", "values", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in inspection["counts"]:
        values = f"{row['num_values']:,}" if row["num_values"] else ""
        table.add_row(row["kind"], row["format"], f"{row['num_entries']:,}", values, f"{row['num_bytes']:,}")
    return table


def _entries(inspection: Mapping[str, Any]) -> Table:
    table = _table("name", "kind", "format", "dtype")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for row in inspection["rows"]:
        shape, size = shape_text(tuple(row["shape"])), f"{row['num_bytes']:,}"
        table.add_row(DottedName(row["name"]), row["kind"], row["format"], row["dtype"], shape, size)
    return table


def _concerns(inspection: Mapping[str, Any]) -> RenderableType:
    if not inspection["concerns"]:
        return Text("no suspicious scales", style="green")
    table = _table("suspicious", "why")
    for row in inspection["concerns"]:
        table.add_row(DottedName(row["name"]), Text(row["text"], style="yellow"))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
