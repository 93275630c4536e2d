"""What ``octavo inspect`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_inspection(inspection: Mapping[str, Any], *, with_entries: bool = True) -> RenderableType:
    """Tables of an inspection.

    Args:
        inspection: ``Inspection.to_json_object()``.
        with_entries: Every entry, not only the sums by format.
    """
    parts: list[RenderableType] = [_title(inspection), _formats(inspection)]
    if with_entries:
        parts.append(_entries(inspection))
    parts.append(_concerns(inspection))
    return Group(*parts)


def _title(inspection: Mapping[str, Any]) -> Text:
    facts = ", ".join(f"{name} {value}" for name, value in inspection["facts"].items())
    head = f"{inspection['path']}: {inspection['layout']} layout, {inspection['tensor_bytes'] / 1e6:,.2f} MB of tensors"
    return Text(f"{head}\n{facts}" if facts else head)


def _formats(inspection: Mapping[str, Any]) -> Table:
    table = Table("kind", "format", title="Formats", title_justify="left")
    for name in ("entries", "values", "bytes"):
        table.add_column(name, justify="right")
    for row in inspection["counts"]:
        numbers = (row["num_entries"], row["num_values"], row["num_bytes"])
        table.add_row(row["kind"], row["format"], *(f"{number:,}" for number in numbers))
    return table


def _entries(inspection: Mapping[str, Any]) -> Table:
    table = Table(title="Entries", title_justify="left")
    table.add_column("name", overflow="fold")
    for name in ("kind", "format", "dtype", "shape"):
        table.add_column(name)
    table.add_column("bytes", justify="right")
    for row in inspection["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(Text(row["name"]), row["kind"], row["format"], row["dtype"], shape, f"{row['num_bytes']:,}")
    return table


def _concerns(inspection: Mapping[str, Any]) -> RenderableType:
    if not inspection["concerns"]:
        return Text("No suspicious scales.")
    table = Table(title="Suspicious", title_justify="left")
    for name in ("name", "concern"):
        table.add_column(name, overflow="fold")
    for row in inspection["concerns"]:
        table.add_row(Text(row["name"]), row["text"])
    return table
