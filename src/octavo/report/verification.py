"""The outcome of a verification, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from octavo.report.words import bytes_text, count_text

_MOST = 8
_ENGINE_REMARKS = {
    "wide_weights": (("quantized weight", ""), "in high precision"),
    "float_products": (("product", ""), "of quantized operands in float"),
    "unfused_attention": (("softmax", "softmaxes"), "not fused with the products around"),
}


def verification_view(result: Mapping[str, Any], directory: str) -> RenderableType:
    """What was compared, and the first of whatever does not agree; ``result`` is the ``--json`` object."""
    lines = [Text.assemble((directory, "bold"), "  ", _verdict(result["agrees"], is_run="graphs" in result))]
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
    lines += [Text(_graph_text(graph)) for graph in result.get("graphs", ())]
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


def _graph_text(graph: Mapping[str, Any]) -> str:
    """What running one file said."""
    if not graph["runtime"]:
        return f"{graph['file']}: weights only; give --data to run it"
    refused = f" ({'; '.join(graph['refusals'])})" if graph["refusals"] else ""
    worst = graph["worst_node"]
    codes = ""
    if worst is not None:
        codes = (
            f"; fed the same input, {graph['num_nodes']} quantized nodes give at least "
            f"{100 * worst['share_equal']:.3f} % equal codes, the worst {worst['worst']} off"
        )
    unfused = graph["unfused"]
    if unfused:
        codes += f"; {count_text(len(unfused), 'product')} not fused, computed in float: {_first(unfused)}"
    if graph["lost"]:
        codes += f"; quantizers that no file has: {_first(graph['lost'])}"
    if graph["different_outputs"]:
        codes += f"; outputs that differ: {', '.join(list(graph['different_outputs'])[:_MOST])}"
    for name, built in graph["engines"].items():
        codes += f"; TensorRT for {name}: {_engine_text(built)}"
    return (
        f"{graph['file']} runs in {graph['runtime']}{refused}: cosine to the unquantized model {graph['cosine']:.4f}, "
        f"simulated {graph['simulated_cosine']:.4f}{codes}"
    )


def _engine_text(engine: Mapping[str, Any]) -> str:
    """Size of an engine, and what TensorRT did not do in low precision; or why there is none."""
    if not engine["num_bytes"]:
        return engine["needs"] or engine["problem"]
    rest = engine["num_bytes"] - engine["weight_bytes"]
    text = (
        f"{bytes_text(engine['num_bytes'])}, of which weights {bytes_text(engine['weight_bytes'])} "
        f"({bytes_text(engine['file_bytes'])} in the file) and kernels {bytes_text(rest)}"
    )
    for key, (words, what) in _ENGINE_REMARKS.items():
        if engine[key]:
            text += f", {count_text(len(engine[key]), *words)} {what}: {_first(engine[key])}"
    return text


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _verdict(agrees: bool, *, is_run: bool) -> Text:
    how = "" if is_run else ", bit for bit"
    return Text(f"means what was simulated{how}", "green") if agrees else Text("differs", "bold red")
