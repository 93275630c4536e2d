"""A plan for a person: repeated layers folded, grouped by what they get and why; or every parameter in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from octavo.report.fold import fold_names
from octavo.report.words import TIMES, bytes_text, count_text, shape_text, share_text
from octavo.spec.facts import Slot
from octavo.spec.plan import Decision, Plan
from octavo.spec.select import quantizer_name


def plan_view(plan: Plan) -> RenderableType:
    """The plan with repeated layers folded, the coverage and the warnings."""
    sections = _sections(plan)
    widths = _Widths.of([row for section in sections for row in section.rows])
    parts: list[RenderableType] = [_title(plan), _header(widths)]
    for section in sections:
        parts += [section.heading(), section.table(widths), Text()]
    return Group(*parts, coverage_table(plan), Text(), Text(plan_summary(plan), style="bold"), *_notes(plan))


def coverage_table(plan: Plan) -> Table:
    """The account: every parameter and multiply-add in exactly one row."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("coverage", no_wrap=True)
    table.add_column("", ratio=1)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    rows = plan.coverage()
    total_macs = max(1, sum(row.macs or 0 for row in rows))
    for row in rows:
        if row.num_parameters or row.macs:
            parameters = share_text(row.num_parameters / max(1, plan.facts.num_parameters))
            macs = share_text(None if row.macs is None else row.macs / total_macs)
            table.add_row(row.state.value, Text(row.reason, style="dim"), parameters, macs)
    return table


def plan_listing(plan: Plan) -> RenderableType:
    """Every parameter of the model in model order, and every attention call: what it gets, and why."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("parameter", ratio=5, no_wrap=False)
    table.add_column("values", justify="right", no_wrap=True)
    table.add_column("format", ratio=2, overflow="fold")
    table.add_column("rule, or why it stays as it is", ratio=4)
    for decision in plan.decisions:
        for name, count, what, reason in _parameter_rows(decision):
            table.add_row(DottedName(name), f"{count:,}" if count else "", what, Text(reason, style="dim"))
    return Group(_title(plan), table, Text(), Text(plan_summary(plan), style="bold"), *_notes(plan))


def plan_summary(plan: Plan) -> str:
    """One line: ``87.3 % of parameters, 96.1 % of multiply-adds; 90.9 MB -> 24.1 MB``."""
    parameters = share_text(plan.parameters_covered, zero="0 %")
    macs = f"{share_text(plan.macs_covered, zero='0 %')} of multiply-adds" if plan.facts.was_traced else ""
    covered = ", ".join(filter(None, [f"{parameters} of parameters", macs]))
    return f"{covered}; {bytes_text(plan.bytes_before)} -> {bytes_text(plan.bytes_after)}"


@dataclass(frozen=True, slots=True)
class _Row:
    """Sites that are alike, as one pattern."""

    name: str
    count: int
    operation: str
    shape: str
    parameters: str
    macs: str

    def cells(self) -> tuple[str, ...]:
        """Everything but the name."""
        return (
            f"{self.count}{TIMES}" if self.count > 1 else "",
            self.operation,
            self.shape,
            self.parameters,
            self.macs,
        )


_HEADINGS = ("", "operation", "weight", "params", "MACs")


@dataclass(frozen=True, slots=True)
class _Widths:
    """Widths of the columns after the name: the same in every section."""

    columns: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> _Widths:
        columns = zip(*(row.cells() for row in rows), strict=True) if rows else ((),) * len(_HEADINGS)
        return cls(tuple(max(map(len, (head, *cells))) for head, cells in zip(_HEADINGS, columns, strict=True)))

    def grid(self) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(ratio=1)
        for heading, width in zip(_HEADINGS, self.columns, strict=True):
            table.add_column(justify="left" if heading == "operation" else "right", width=width, no_wrap=True)
        return table


@dataclass(frozen=True, slots=True)
class _Section:
    """Everything that gets the same for the same reason."""

    first: Decision
    rows: tuple[_Row, ...]

    def heading(self) -> RenderableType:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", style="dim")
        if not self.first.is_quantized:
            return Text.assemble(("as it is", "bold yellow"), "  ", (self.first.why, "dim"))
        line.add_row(Text(scheme_text(self.first), style="bold green"), self.first.rule)
        return Group(line, Text(self.first.why, style="yellow")) if self.first.why else line

    def table(self, widths: _Widths) -> Table:
        table = widths.grid()
        for row in self.rows:
            table.add_row(Padding(DottedName(row.name), (0, 0, 0, 2)), *row.cells())
        return table


def scheme_text(decision: Decision) -> str:
    """``weight: int8-channel, input: int8-tensor``; slots that get the same are named together."""
    by_format: dict[str, list[str]] = {}
    for slot, spec in decision.scheme.items():
        by_format.setdefault(str(spec), []).append(slot.value)
    return ", ".join(f"{' + '.join(slots)}: {text}" for text, slots in by_format.items())


def _sections(plan: Plan) -> list[_Section]:
    groups: dict[tuple[str, str, str], list[Decision]] = {}
    for decision in plan.decisions:
        is_nothing = not (decision.num_parameters or decision.site.macs or decision.site.tied_to)
        if decision.is_quantized or not is_nothing:
            groups.setdefault((scheme_text(decision), decision.rule, decision.why), []).append(decision)
    ordered = sorted(groups.values(), key=lambda members: not members[0].is_quantized)
    return [_Section(members[0], tuple(_rows(plan, members))) for members in ordered]


def _rows(plan: Plan, members: Sequence[Decision]) -> list[_Row]:
    alike: dict[tuple[str, str, tuple[int, ...]], list[Decision]] = {}
    for decision in members:
        site = decision.site
        alike.setdefault((site.operation, site.type_name, site.weight_shape), []).append(decision)
    rows = []
    for (operation, _, shape), decisions in alike.items():
        by_name = {name: decision for decision in decisions for name in _shown_names(decision)}
        for pattern, names in fold_names(list(by_name)).items():
            rows.append(_row(plan, pattern, operation, shape, [by_name[name] for name in names]))
    return rows


def _shown_names(decision: Decision) -> list[str]:
    """The site's name; for parameters without an operation their own, since that is what they are known by."""
    site = decision.site
    if site.operation != "other" or not site.parameters:
        return [site.name or site.type_name]
    return list(site.parameters)


def _row(plan: Plan, name: str, operation: str, shape: tuple[int, ...], members: Sequence[Decision]) -> _Row:
    sites = {decision.site.name: decision for decision in members}.values()
    parameters = sum(decision.num_parameters for decision in sites)
    macs = sum(decision.site.macs or 0 for decision in sites)
    total_macs = sum(decision.site.macs or 0 for decision in plan.decisions)
    return _Row(
        name=name,
        count=len(members),
        operation=operation,
        shape=shape_text(shape),
        parameters=share_text(parameters / max(1, plan.facts.num_parameters)),
        macs=share_text(macs / max(1, total_macs) if plan.facts.was_traced else None),
    )


def _parameter_rows(decision: Decision) -> list[tuple[str, int, str, str]]:
    """Name, number of values, format, reason; an activation quantizer's reason is that of the weight above it."""
    site = decision.site
    rows = []
    for name, count in site.parameters.items():
        is_weight = name == site.weight_name and decision.weight is not None
        what = str(decision.weight) if is_weight else "as it is"
        reason = decision.rule if is_weight else _why_not(decision, name)
        rows.append((name, count, what, reason))
    weight = quantizer_name(site.name, Slot.WEIGHT)
    reason = "" if decision.weight is not None else decision.rule
    rows += [(name, 0, str(spec), reason) for name, spec in decision.quantizers() if name != weight]
    return rows or [(site.name or site.type_name, 0, "as it is", decision.why)]


def _why_not(decision: Decision, parameter: str) -> str:
    if parameter != decision.site.weight_name and decision.is_quantized:
        return "not a weight"
    return decision.why


def _title(plan: Plan) -> Text:
    target = f"  target {plan.target}" if plan.target else ""
    return Text.assemble(
        (plan.facts.model, "bold"), f"  {plan.facts.type_name}  recipe ", (plan.recipe, "bold"), target
    )


def _header(widths: _Widths) -> Table:
    table = widths.grid()
    table.add_row("", *(Text(heading, style="dim") for heading in _HEADINGS))
    return table


def _notes(plan: Plan) -> list[Text]:
    notes = [*plan.facts.notes, *plan.warnings]
    if plan.experts is not None:
        notes.append(f"{count_text(len(plan.facts.experts), 'layer')} of experts: {plan.experts}")
    return [Text(f"note: {note}", style="yellow") for note in notes]


class DottedName:
    """A dotted name that folds at its dots, the following lines indented."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(fold_at_dots(self.name, options.max_width)), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(len, self.name.split(".")), default=1) + 3
        return Measurement(min(longest, options.max_width), min(len(self.name), options.max_width))


def fold_at_dots(name: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters where the name's components allow it, broken before a dot.

    >>> fold_at_dots("encoder.layers.0.self_attn", 17)
    ['encoder.layers.0', '  .self_attn']
    """
    lines, line = [], ""
    for number, part in enumerate(_components(name)):
        piece = f".{part}" if number else part
        if line and len(line) + len(piece) > width:
            lines.append(line)
            line = "  "
        line += piece
    return [*lines, line]


def _components(name: str) -> list[str]:
    """Components of a name; dots inside braces belong to a range."""
    parts = [""]
    depth = 0
    for character in name:
        depth += (character == "{") - (character == "}")
        if character == "." and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
