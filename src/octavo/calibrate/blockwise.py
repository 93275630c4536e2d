"""The walk over a model's blocks: gather once, let every step work, settle, hand on; one block at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate.algorithm import Algorithm
from octavo.calibrate.batches import Calibrated, require_no_data
from octavo.errors import UserError
from octavo.numerics.door import Block, Door
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.numerics.tensor_error import relative_error
from octavo.report.clock import Clock
from octavo.report.progress import Track, silent
from octavo.spec.plan import Plan
from octavo.spec.records import BlockRecord, StepRecord
from octavo.spec.steps import Step, matcher

logger = logging.getLogger(__name__)

Steps = Sequence[tuple[Step, Algorithm]]
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 5e-2  # of fp16 and bf16: a weight is rounded every time it is written


def require_data_for(steps: Steps) -> None:
    """Raise ``UserError`` when a step cannot work without calibration data."""
    for step, algorithm in steps:
        if algorithm.needs - {Need.QUANTIZED}:
            what = ", ".join(sorted(need.value.replace("_", " ") for need in algorithm.needs - {Need.QUANTIZED}))
            raise UserError(
                f"step '{step.name}' learns from the inputs of the layers ({what}): give calibration data, or take the "
                "step out of the recipe"
            )


def calibrate_blockwise(
    door: Door,
    plan: Plan,
    steps: Steps,
    batches: Iterable[Any] | None,
    *,
    is_quantized: bool,
    track: Track = silent,
) -> Calibrated:
    """Find every range of ``plan`` and let ``steps`` work on every block, in the order of the forward pass.

    Args:
        door: A prepared model.
        plan: What it was prepared with.
        steps: Each with its algorithm, in order.
        batches: One forward pass each; ``None`` where no step and no quantizer needs data.
        is_quantized: A block's inputs come through the quantized blocks before it, so that it can make up for them.
        track: Told of every block.

    Raises:
        UserError: the plan or a step needs data and there is none, a step is refused or fails, or one that should keep
            the function does not; the message names block and layers.
        NotFiniteError: NaN or inf in an activation or a weight, with the layer's name.
    """
    if batches is None:
        require_no_data(plan)
        require_data_for(steps)
    needs: frozenset[Need] = frozenset().union(*(algorithm.needs for _, algorithm in steps))
    told = _Told()
    chosen = matchers(plan, [step for step, _ in steps])
    keeps = Need.CROSS in needs
    with Store() as store, door.evaluating():
        walk = door.walk(batches, store, is_quantized=is_quantized, keeps_unquantized=keeps)
        num_batches = walk.num_batches
        if batches is not None and not num_batches:
            raise UserError("the calibration data is empty: it gave no batch")
        for block in track(walk, told.now):
            clock = Clock()
            with clock.phase("block"):
                told.at(block.name, "gather")
                block.gather(needs)
                rows, plain = _run_steps(block, [(s, a, chosen[s]) for s, a in steps], told)
                told.at(block.name, "round")
                told.off.update(block.settle())
                error = block.advance()
            told.finished(
                BlockRecord(name=block.name, error=error, plain_error=plain, steps=rows, seconds=clock.seconds["block"])
            )
    for name, why in told.off.items():
        logger.warning("quantizer '%s' stays off: %s", name, why)
    tokens = {path: list(counts) for path, counts in door.expert_tokens().items()}
    return Calibrated(num_batches, told.off, tokens, tuple(told.blocks), tuple(told.notes))


class _Told:
    """What a walk tells, while it runs and afterwards."""

    def __init__(self) -> None:
        self.off: dict[str, str] = {}
        self.notes: list[str] = []
        self.blocks: list[BlockRecord] = []
        self._place = "block by block"

    def now(self) -> str:
        """What is being done at this moment, and how well the last block went."""
        errors = [block.error for block in self.blocks if block.error is not None]
        last = f" (error of the last block {errors[-1]:.1e})" if errors else ""
        return f"calibrate {self._place}{last}"

    def at(self, block: str, what: str) -> None:
        """``what`` begins."""
        self._place = f"{block}: {what}"

    def finished(self, block: BlockRecord) -> None:
        """A block is done."""
        self.blocks.append(block)
        if block.error is not None:
            logger.info("block '%s': relative squared error of its output %.2e", block.name, block.error)


def matchers(plan: Plan, steps: Sequence[Step]) -> Mapping[Step, frozenset[str]]:
    """The layers with a quantized weight that each step is for.

    Raises:
        UserError: a step's pattern matches none of them.
    """
    weights = [decision.site for decision in plan.decisions if decision.weight is not None]
    return {step: matcher(step, weights) for step in steps}


_Chosen = tuple[Step, Algorithm, frozenset[str]]


def _run_steps(block: Block, steps: Sequence[_Chosen], told: _Told) -> tuple[list[StepRecord], float | None]:
    """Every step on its layers of a block; what each left of the error, and the error before the first."""
    work = [(step, algorithm, [x for x in block.layers() if x in chosen]) for step, algorithm, chosen in steps]
    work = [(step, algorithm, layers) for step, algorithm, layers in work if layers]
    if not work:
        return [], None
    full = block.probe()
    plain = _error_so_far(block, full)
    rows = []
    for step, algorithm, layers in work:
        told.at(block.name, step.name)
        clock = Clock()
        with clock.phase(step.name):
            told.notes += _run_step(block, step, algorithm, layers)
        error = _error_so_far(block, full)
        rows.append(StepRecord(name=step.name, error=error, seconds=clock.seconds[step.name]))
    return rows, plain


def _error_so_far(block: Block, full: Sequence[Tensor]) -> float | None:
    """What rounding the weights costs now, by a few samples."""
    rounded = block.probe_rounded()
    return relative_error(rounded, full) if rounded else None


def _run_step(block: Block, step: Step, algorithm: Algorithm, layers: Sequence[str]) -> list[str]:
    before = block.probe() if algorithm.preserves_function else ()
    left = algorithm.apply(block, layers)
    if algorithm.preserves_function:
        _check_preserved(block, step, layers, before, block.probe())
    return [f"layer '{layer}': step '{step.name}' left it alone: {why}" for layer, why in left.items()]


def _check_preserved(
    block: Block, step: Step, layers: Sequence[str], before: Sequence[Tensor], after: Sequence[Tensor]
) -> None:
    """Raise when the block computes something else than before, beyond rounding."""
    for old, new in zip(before, after, strict=True):
        size = float(old.float().abs().max()) if old.numel() else 0.0
        change = float((new.float() - old.float()).abs().max()) if old.numel() else 0.0
        if not change <= _TOLERANCE.get(old.dtype, _COARSE) * size:
            shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
            raise UserError(
                f"step '{step.name}' should keep the function of block '{block.name}', and changed its output by "
                f"{change:.2g} of at most {size:.2g} (layers {shown}): leave the layers out of the step with 'select', "
                "and report it"
            )
