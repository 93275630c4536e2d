"""A run whose weights go to another stored format, without its model and without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from octavo.errors import UserError
from octavo.export.run import write_run
from octavo.export.run_files import RunFiles, read_run
from octavo.numerics.conversions import convert
from octavo.numerics.snapshot import LayerSnapshot
from octavo.spec.facts import Slot
from octavo.spec.formats import format_name, tensor_format
from octavo.spec.plan import Plan, QuantizerSpec
from octavo.spec.tensor_format import TensorFormat


@dataclasses.dataclass(frozen=True, slots=True)
class LayerChange:
    """What the conversion of one weight changed.

    Args:
        name: The layer.
        before: The format it had.
        num_values: Values in the weight.
        num_changed: Those that are not what they were.
        num_blocks: Blocks of the new format.
        num_changed_blocks: Those with such a value.
        relative_error: Norm of the change over the norm of the values.
    """

    name: str
    before: str
    num_values: int
    num_changed: int
    num_blocks: int
    num_changed_blocks: int
    relative_error: float


class _Converted:
    """``Snapshot`` of a run with other weights; knows what changed once its layers were read."""

    def __init__(self, files: RunFiles, fmt: TensorFormat) -> None:
        self.files, self.format = files, fmt
        self.changes: list[LayerChange] = []

    def layers(self) -> Iterator[LayerSnapshot]:
        """See ``Snapshot.layers``."""
        for layer in self.files.layers():
            yield layer if layer.weight is None else self._layer(layer)

    def _layer(self, layer: LayerSnapshot) -> LayerSnapshot:
        assert layer.weight is not None
        found = convert(layer.weight, self.format)
        before = format_name(layer.weight.format)
        blocks = found.changed
        self.changes.append(
            LayerChange(
                layer.name,
                before,
                layer.weight.codes.numel(),
                found.num_changed,
                blocks.numel(),
                int(blocks.sum()),
                found.relative_error,
            )
        )
        return dataclasses.replace(layer, weight=found.tensor)

    def passthrough(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Snapshot.passthrough``."""
        return self.files.passthrough()

    def tied(self) -> Mapping[str, str]:
        """See ``Snapshot.tied``."""
        return self.files.tied()


def convert_run(
    run: Path, fmt: TensorFormat | str, out: Path, *, trust_remote_code: bool = False
) -> tuple[LayerChange, ...]:
    """Write the run ``out``: that of ``run`` with every quantized weight in ``fmt``, each value kept or rounded once.

    Quantizers of activations stay as they are. What was measured of ``run`` is not said of ``out``.

    Args:
        run: A run directory.
        fmt: The new format of weights, or its name in the catalogue.
        out: The run directory to write.
        trust_remote_code: Copy the model's Python files, too.

    Raises:
        UserError: not a run, a weight that the format does not fit, or ``out`` holds something else.
    """
    fmt = tensor_format(fmt) if isinstance(fmt, str) else fmt
    files = read_run(run)
    plan = _converted_plan(files.plan, fmt)
    snapshot = _Converted(files, fmt)
    record = dataclasses.replace(
        files.record,
        metrics={},
        sensitivity=(),
        seconds={},
        warnings=(*files.record.warnings, f"weights converted to {format_name(fmt)} from the run {run.name}"),
    )
    write_run(
        snapshot,
        plan,
        recipe=files.recipe,
        record=record,
        source_directory=files.directory,
        out=out,
        trust_remote_code=trust_remote_code,
    )
    return tuple(snapshot.changes)


def _converted_plan(plan: Plan, fmt: TensorFormat) -> Plan:
    decisions = []
    for decision in plan.decisions:
        weight = decision.weight
        if weight is not None:
            problem = fmt.misfit(decision.site.weight_shape)
            if problem is not None:
                raise UserError(f"layer {decision.site.name!r} cannot become {format_name(fmt)}: {problem}")
            scheme = {**decision.scheme, Slot.WEIGHT: QuantizerSpec(fmt, False, weight.observer)}
            decision = dataclasses.replace(decision, scheme=scheme)
        decisions.append(decision)
    return dataclasses.replace(plan, decisions=tuple(decisions))
