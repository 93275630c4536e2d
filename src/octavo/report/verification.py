"""The outcome of a verification, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from octavo.report.words import count_text

_MOST = 8


def verification_view(result: Mapping[str, Any], directory: str) -> RenderableType:
    """What was compared, and the first of whatever does not agree; ``result`` is the ``--json`` object."""
    lines = [Text.assemble((directory, "bold"), "  ", _verdict(result["agrees"]))]
    lines.append(
        Text(
            f"{count_text(result['num_weights'], 'quantized weight')}, "
            f"{count_text(result['num_tensors'], 'other tensor')} and "
            f"{count_text(result['num_activations'], 'activation scale')} compared: {result['num_values']:,} values"
        )
    )
    if result["worst_output"] is not None:
        lines.append(
            Text(
                f"outputs of {count_text(result['num_batches'], 'batch', 'batches')}: "
                f"largest difference {result['worst_output']:.3g}"
            )
        )
    if result["narrowed"]:
        narrowed = count_text(len(result["narrowed"]), "tensor")
        lines.append(Text(f"{narrowed} stored in a narrower dtype, and compared in it"))
    troubles = [f"{entry['name']}: {entry['text']}" for entry in result["differences"]]
    troubles += [f"{name}: missing" for name in result["missing"]]
    troubles += [f"{name}: nobody expected it" for name in result["extra"]]
    lines += [Text(f"  {trouble}", style="red") for trouble in troubles[:_MOST]]
    if len(troubles) > _MOST:
        lines.append(Text(f"  and {len(troubles) - _MOST} more", style="red"))
    return Group(*lines)


def _verdict(agrees: bool) -> Text:
    return Text("means what was simulated, bit for bit", "green") if agrees else Text("differs", "bold red")
