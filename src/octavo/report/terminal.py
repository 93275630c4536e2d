"""What a person sees in a terminal: rich renderables. Printing is the command line's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.report.fold import fold_names
from octavo.report.plan_view import DottedName, plan_listing, plan_summary, plan_view
from octavo.report.words import bytes_text, number_text, seconds_text, share_text
from octavo.spec.recipe import Recipe
from octavo.spec.records import BlockRecord, MetricRecord, RunRecord, SensitivityRecord

__all__ = [
    "blocks_table",
    "comparison_table",
    "leave_hint",
    "metrics_table",
    "plan_listing",
    "plan_summary",
    "plan_view",
    "recipes_table",
    "run_view",
    "sensitivity_table",
]

_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "kl")
_BAR_WIDTH = 12
_MOST_BLOCKS = 8


def metrics_table(metrics: Mapping[str, Mapping[str, MetricRecord]]) -> Table:
    """A row per metric: baseline, quantized, change, its standard error; red where worse by more than two of these.

    Columns that would be empty, as when only one model was measured, are not there.
    """
    rows = [
        (task if number == 0 else "", name, metric)
        for task, of_task in metrics.items()
        for number, (name, metric) in enumerate(of_task.items())
    ]
    columns: dict[str, list[Text]] = {
        "baseline": [Text(number_text(metric.baseline)) for _, _, metric in rows],
        "quantized": [Text(number_text(metric.quantized)) for _, _, metric in rows],
        "change": [_change(name, metric) for _, name, metric in rows],
        "± s.e.": [Text(_error_text(metric)) for _, _, metric in rows],
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cell.plain not in ("", "-") for cell in cells)}
    table = _table("task", "metric")
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (task, name, _) in enumerate(rows):
        table.add_row(task, name, *(cells[number] for cells in shown.values()))
    return table


def comparison_table(runs: Mapping[str, RunRecord]) -> Table:
    """Several runs of one model side by side: a row per metric, the baseline, then a column per run."""
    table = _table("task", "metric")
    table.add_column("baseline", justify="right", no_wrap=True)
    for name in runs:
        table.add_column(name, justify="right")
    seen = {(task, name): None for run in runs.values() for task, of in run.metrics.items() for name in of}
    previous = ""
    for task, name in seen:
        found = [run.metrics.get(task, {}).get(name, MetricRecord()) for run in runs.values()]
        baseline = next((metric.baseline for metric in found if metric.baseline is not None), None)
        values = [_value_with_change(name, metric) for metric in found]
        table.add_row(task if task != previous else "", name, number_text(baseline), *values)
        previous = task
    sizes = [bytes_text(run.bytes_after) for run in runs.values()]
    before = next((run.bytes_before for run in runs.values()), None)
    table.add_row("size", "", bytes_text(before), *sizes)
    return table


def sensitivity_table(rows: Sequence[SensitivityRecord], *, most: int | None = None) -> RenderableType:
    """Quantizers with what each one alone costs, worst first, with a bar."""
    shown = [row for row in rows if row.cost is not None][:most]
    metric = shown[0].metric if shown else "cost"
    table = _table("", "quantizer", "format")
    table.columns[0].justify = "right"
    table.columns[2].no_wrap = True
    table.add_column(f"loss of {metric}", justify="right", no_wrap=True)
    table.add_column("", width=_BAR_WIDTH, no_wrap=True)
    worst = max((abs(row.cost or 0.0) for row in shown), default=0.0)
    for rank, row in enumerate(shown, start=1):
        cost = row.cost or 0.0
        table.add_row(str(rank), DottedName(row.quantizer), row.format, f"{cost:#.2g}", _bar(cost, worst))
    left_over = len(rows) - len(shown)
    return Group(table, Text(f"and {left_over} more", style="dim")) if left_over else table


def blocks_table(blocks: Sequence[BlockRecord], *, most: int | None = None) -> RenderableType:
    """What rounding costs each block, in per cent of its output's energy: after every step, and in the end.

    Args:
        blocks: In their order.
        most: Of more than these, only the worst, in their order.
    """
    steps = list(dict.fromkeys(step.name for block in blocks for step in block.steps))
    table = _table("block")
    for heading in ("plain", *(f"+ {step}" for step in steps), "all rounded"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_error = sorted(blocks, key=lambda block: block.error or 0.0, reverse=True)
    shown = set(map(id, by_error[:most]))
    for block in blocks:
        if id(block) in shown:
            errors = {step.name: step.error for step in block.steps}
            values = [block.plain_error, *(errors.get(step) for step in steps), block.error]
            table.add_row(DottedName(block.name), *map(_percent, values))
    left_over = len(blocks) - len(shown)
    return Group(table, Text(f"and {left_over} more, which err less", style="dim")) if left_over else table


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2g} %"


def leave_hint(quantizers: Sequence[str]) -> str:
    """The options that would leave these quantizers out: ``--leave 'h.{0,3}.fc.input_quantizer'``."""
    return " ".join(f"--leave '{pattern}'" for pattern in fold_names(quantizers))


def run_view(record: RunRecord) -> RenderableType:
    """A finished run: what was done, what it cost in quality, where the time went."""
    covered = [f"{share_text(record.parameters_covered, zero='0 %')} of parameters"]
    if record.macs_covered is not None:
        covered.append(f"{share_text(record.macs_covered, zero='0 %')} of multiply-adds")
    size = f"{bytes_text(record.bytes_before)} -> {bytes_text(record.bytes_after)}"
    left = "".join(f" --leave '{pattern}'" for pattern in record.leave)
    lines = [Text.assemble((record.model, "bold"), "  ", (record.recipe or "not quantized", "bold"), left)]
    if record.parameters_covered is not None:
        lines.append(Text(f"{', '.join(covered)}; {size}"))
    parts: list[RenderableType] = [*lines]
    if record.metrics:
        parts += [Text(), metrics_table(record.metrics), Text()]
    if any(block.error is not None or block.steps for block in record.blocks):
        parts += [Text(), blocks_table(record.blocks, most=_MOST_BLOCKS), Text()]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in record.warnings]
    parts += [_cost(record)] if record.seconds or record.peak_memory_bytes else []
    return Group(*parts, *([Text(f"written to {record.output}")] if record.output else []))


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """Presets with their aliases and one sentence each."""
    table = _table("recipe", "what it does")
    for recipe in recipes:
        aliases = f" (also {', '.join(recipe.aliases)})" if recipe.aliases else ""
        table.add_row(Text(recipe.name, style="bold"), recipe.description + aliases)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _change(name: str, metric: MetricRecord) -> Text:
    if metric.change is None or _is_boundless(metric):
        return Text("-")
    return Text(number_text(metric.change, signed=True), style=_style(name, metric.change, metric.standard_error))


def _is_boundless(metric: MetricRecord) -> bool:
    """From an infinite baseline (signal to no noise at all) every change is infinite, and says nothing."""
    return metric.baseline is not None and math.isinf(metric.baseline)


def _error_text(metric: MetricRecord) -> str:
    return "" if metric.standard_error is None or _is_boundless(metric) else number_text(metric.standard_error)


def _value_with_change(name: str, metric: MetricRecord) -> Text:
    if metric.change is None or _is_boundless(metric):
        return Text(number_text(metric.quantized))
    error = "" if metric.standard_error is None else f" ± {number_text(metric.standard_error)}"
    style = _style(name, metric.change, metric.standard_error)
    change = f"({number_text(metric.change, signed=True)}{error})"
    return Text.assemble(f"{number_text(metric.quantized)} ", (change, style))


def _style(name: str, change: float, standard_error: float | None) -> str:
    """Red for worse, green for better, dim within two standard errors."""
    if math.isnan(change):
        return "red"
    if change == 0 or abs(change) <= 2 * (standard_error or 0.0):
        return "dim"
    return "red" if (change > 0) == (name in _LOWER_IS_BETTER) else "green"


def _bar(cost: float, worst: float) -> Text:
    filled = round(_BAR_WIDTH * max(0.0, cost) / worst) if worst > 0 and math.isfinite(worst) else 0
    return Text("█" * filled, style="red")


def _cost(record: RunRecord) -> Text:
    times = [f"{phase} {seconds_text(seconds)}" for phase, seconds in record.seconds.items()]
    memory = [f"peak memory {bytes_text(record.peak_memory_bytes)}"] if record.peak_memory_bytes else []
    return Text(", ".join(times + memory), style="dim")
