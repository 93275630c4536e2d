"""The outcome of a verification, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

_MOST = 8


def verification_view(result: Mapping[str, Any], directory: str) -> RenderableType:
    """What was compared, and the first of whatever does not agree; ``result`` is the ``--json`` object."""
    lines = [Text.assemble((directory, "bold"), "  ", _verdict(result["agrees"]))]
    lines.append(
        Text(
            f"{result['num_weights']} quantized weights, {result['num_tensors']} other tensors and "
            f"{result['num_activations']} activation scales compared: {result['num_values']:,} values"
        )
    )
    if result["worst_output"] is not None:
        lines.append(
            Text(f"outputs of {result['num_batches']} batches: largest difference {result['worst_output']:.3g}")
        )
    if result["narrowed"]:
        lines.append(Text(f"{len(result['narrowed'])} tensors are stored in a narrower dtype and compared in it"))
    troubles = [f"{entry['name']}: {entry['text']}" for entry in result["differences"]]
    troubles += [f"{name}: missing" for name in result["missing"]]
    troubles += [f"{name}: nobody expected it" for name in result["extra"]]
    lines += [Text(f"  {trouble}", style="red") for trouble in troubles[:_MOST]]
    if len(troubles) > _MOST:
        lines.append(Text(f"  and {len(troubles) - _MOST} more", style="red"))
    return Group(*lines)


def _verdict(agrees: bool) -> Text:
    return Text("means what was simulated, bit for bit", "green") if agrees else Text("differs", "bold red")
