"""The catalogue of tensor formats as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from octavo.spec.element import CodebookFormat, ElementFormat
from octavo.spec.tensor_format import TensorFormat


@dataclass(frozen=True, slots=True)
class Carrier:
    """A checkpoint layout that holds weights of a format, beside what inputs, and who loads that."""

    layout: str
    inputs: tuple[str, ...]
    runtimes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FormatRow:
    """What is known of one format.

    Args:
        name: Its name in recipes.
        format: Its meaning.
        bits: Stored bits per value of a 4096 x 4096 tensor, scales counted.
        error_normal: Norm of the error over the norm of the values, for values of a normal distribution.
        error_heavy: The same for Student's t with five degrees of freedom, whose tails are heavy.
        carriers: Layouts that hold weights of it.
    """

    name: str
    format: TensorFormat
    bits: float
    error_normal: float
    error_heavy: float
    carriers: tuple[Carrier, ...]

    def to_json_object(self) -> dict[str, Any]:
        """As ``octavo formats --json`` prints it."""
        element = self.format.element
        return {
            **self.format.to_dict(),
            "meaning": str(self.format),
            "bits_per_element": self.bits,
            "range": [element.min, element.max],
            "relative_error": {"normal": self.error_normal, "heavy_tailed": self.error_heavy},
            "layouts": [asdict(carrier) for carrier in self.carriers],
        }


def formats_table(rows: Sequence[FormatRow]) -> Table:
    """Name and meaning, bits, values of a code, errors of normal and heavy-tailed values in per cent, layouts."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("format", overflow="fold", min_width=26)
    for heading in ("bits", "codes", "normal", "heavy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("exports: engines", overflow="fold")
    for row in rows:
        table.add_row(
            Text.assemble(row.name, "\n", (str(row.format), "dim")),
            f"{row.bits:.3f}",
            _range_text(row.format.element),
            f"{100 * row.error_normal:.3g} %",
            f"{100 * row.error_heavy:.3g} %",
            "\n".join(_carrier_text(carrier) for carrier in row.carriers) or "-",
        )
    return table


def conversion_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    """Weights that a conversion changed: how many blocks and values, and by how much."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("layer", "was"):
        table.add_column(heading, overflow="fold")
    for heading in ("blocks changed", "values", "error"):
        table.add_column(heading, justify="right")
    for change in changes:
        table.add_row(
            change["name"],
            change["before"],
            f"{change['num_changed_blocks']:,} of {change['num_blocks']:,}",
            f"{change['num_changed']:,}",
            f"{100 * change['relative_error']:.2g} %",
        )
    return table


def _carrier_text(carrier: Carrier) -> str:
    return f"{carrier.layout}: {', '.join(carrier.runtimes)}" if carrier.runtimes else carrier.layout


def _range_text(element: ElementFormat) -> str:
    if isinstance(element, CodebookFormat):
        return f"{len(element.values)} values"
    return f"±{element.max:g}" if element.max == -element.min else f"{element.min:g}..{element.max:g}"
