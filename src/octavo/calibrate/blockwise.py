"""The walk over a model's blocks: gather once, let every step work, settle, hand on; one block at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate.algorithm import Algorithm
from octavo.calibrate.batches import Calibrated, require_no_data
from octavo.calibrate.checkpoint import Checkpoint, Keeping
from octavo.errors import UserError
from octavo.numerics.block import Block, site_of
from octavo.numerics.block_state import BlockState
from octavo.numerics.digest import Digest
from octavo.numerics.door import Door
from octavo.numerics.statistics import Need
from octavo.numerics.store import Store
from octavo.numerics.tensor_error import relative_error
from octavo.report.clock import Clock
from octavo.report.progress import Track, silent
from octavo.spec.plan import Plan
from octavo.spec.records import BlockRecord, StepRecord
from octavo.spec.step_order import fused_rotation, require_order
from octavo.spec.steps import Step, matcher

logger = logging.getLogger(__name__)

Steps = Sequence[tuple[Step, Algorithm]]
_Chosen = tuple[Step, Algorithm, frozenset[str]]
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_MOST_NUMBERS = 8
_COARSE = 5e-2  # of fp16 and bf16: a weight is rounded every time it is written


def require_data_for(steps: Steps) -> None:
    """Raise ``UserError`` when a step cannot work without calibration data."""
    for step, algorithm in steps:
        if gathered := algorithm.needs - {Need.QUANTIZED, Need.GRADIENTS}:
            what = ", ".join(sorted(need.value.replace("_", " ") for need in gathered))
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
    keeping: Keeping | None = None,
    folds_only: AbstractSet[str] = frozenset(),
) -> Calibrated:
    """Find every range of ``plan`` and let ``steps`` work on every block, in the order of the forward pass.

    Args:
        door: A prepared model.
        plan: What it was prepared with.
        steps: Each with its algorithm, in order.
        batches: One forward pass each; ``None`` where no step and no quantizer needs data.
        is_quantized: A block's inputs come through the quantized blocks before it, so that it can make up for them.
        track: Told of every block.
        keeping: Where finished blocks wait, so that a walk that was killed goes on where it was.
        folds_only: Layers whose input takes a scale only where it can be folded, because files have no place for it.

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
    data = Digest()
    with Store() as store, door.evaluating(), ExitStack() as cleanup:
        rotation = fused_rotation([step for step, _ in steps])
        if rotation is not None:
            told.notes += door.rotate(rotation.block)
        seen = batches if batches is None or keeping is None else data.watched(batches)
        walk = door.walk(seen, store, is_quantized=is_quantized, keeps_unquantized=keeps, folds_only=folds_only)
        num_batches = walk.num_batches
        if batches is not None and not num_batches:
            raise UserError("the calibration data is empty: it gave no batch")
        kept = None if keeping is None else cleanup.enter_context(keeping.opened(data=str(data)))
        work = [(step, algorithm, chosen[step]) for step, algorithm in steps]
        for number, block in enumerate(track(walk, told.now)):
            done = None if kept is None else _recalled(block, number, kept, told)
            if done is None:
                done = _worked_on(block, needs, work, told)
                if kept is not None:
                    _kept(block, number, kept, done)
            told.finished(done, block.advance())
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

    def finished(self, done: _Done, error: float | None) -> None:
        """A block is done."""
        self.off |= done.off
        self.notes += done.notes
        self.blocks.append(done.block.model_copy(update={"error": error}))
        if error is not None:
            logger.info("block '%s': relative squared error of its output %.2e", done.block.name, error)


@dataclass(frozen=True, slots=True)
class _Done:
    """What is to be told of a block that was worked on."""

    block: BlockRecord
    off: dict[str, str]
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        return {"block": self.block.model_dump(), "off": self.off, "notes": self.notes}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> _Done:
        return cls(BlockRecord.model_validate(facts["block"]), dict(facts["off"]), list(facts["notes"]))


def _worked_on(block: Block, needs: frozenset[Need], work: Sequence[_Chosen], told: _Told) -> _Done:
    """Gather, steps, ranges."""
    clock = Clock()
    told.at(block.name, "gather")
    with clock.phase("block"):
        block.gather(needs)
        rows, plain, notes = _run_steps(block, work, told)
        told.at(block.name, "round")
        off = dict(block.settle())
    seconds = clock.seconds["block"]
    return _Done(BlockRecord(name=block.name, plain_error=plain, steps=rows, seconds=seconds), off, notes)


def matchers(plan: Plan, steps: Sequence[Step]) -> Mapping[Step, frozenset[str]]:
    """The layers with a quantized weight that each step is for.

    Raises:
        UserError: a step's pattern matches none of them, or steps for one layer stand in no order that works.
    """
    weights = [decision.site for decision in plan.decisions if decision.weight is not None]
    chosen = [(step, matcher(step, weights)) for step in steps]
    require_order(chosen)
    return dict(chosen)


def _kept(block: Block, number: int, kept: Checkpoint, done: _Done) -> None:
    state = block.state()
    kept.keep(number, block.name, BlockState(state.tensors, {"block": state.facts, "done": done.facts()}))


def _recalled(block: Block, number: int, kept: Checkpoint, told: _Told) -> _Done | None:
    """A block that was finished before is so again; ``None`` where it was not."""
    state = kept.find(number, block.name)
    if state is None:
        return None
    told.at(block.name, "finished before")
    block.recall(BlockState(state.tensors, state.facts["block"]))
    return _Done.of(state.facts["done"])


def _run_steps(block: Block, steps: Sequence[_Chosen], told: _Told) -> tuple[list[StepRecord], float | None, list[str]]:
    """Every step on its layers of a block; what each left of the error, the error before the first, and notes."""
    work = [(s, algorithm, [x for x in block.layers() if site_of(x) in chosen]) for s, algorithm, chosen in steps]
    work = [(step, algorithm, layers) for step, algorithm, layers in work if layers]
    if not work:
        return [], None, []
    rounded = block.probe_rounded()
    full = block.probe() if rounded else ()  # a block that cannot be tried need not be run to compare with
    plain = relative_error(rounded, full) if rounded else None
    rows: list[StepRecord] = []
    notes = _of_assumptions(block)
    for step, algorithm, layers in work:
        told.at(block.name, step.name)
        clock = Clock()
        with clock.phase(step.name):
            notes += _run_step(block, step, algorithm, layers)
        error = _error_so_far(block, full)
        rows.append(StepRecord(name=step.name, error=error, seconds=clock.seconds[step.name]))
    return rows, plain, notes


def _error_so_far(block: Block, full: Sequence[Tensor]) -> float | None:
    """What rounding the weights costs now, by a few samples."""
    rounded = block.probe_rounded()
    return relative_error(rounded, full) if rounded else None


def _run_step(block: Block, step: Step, algorithm: Algorithm, layers: Sequence[str]) -> list[str]:
    before = block.probe() if algorithm.preserves_function else ()
    left = algorithm.apply(block, layers)
    if algorithm.preserves_function:
        _check_preserved(block, step, layers, before, block.probe(as_before=True))
    return [f"layer {where}: step '{step.name}' left it alone: {why}" for where, why in _places(block, left)]


def _places(block: Block, reasons: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Where and why; matrices of one stack together."""
    together: dict[tuple[str, str], list[str]] = {}
    for layer, why in reasons.items():
        together.setdefault((site_of(layer), why), []).append(layer)
    for (site, why), layers in together.items():
        if site in layers:
            yield f"'{site}'", why
        else:
            total = sum(site_of(layer) == site for layer in block.layers())
            numbers = ", ".join(layer[len(site) + 1 : -1] for layer in layers[:_MOST_NUMBERS])
            more = ", ..." if len(layers) > _MOST_NUMBERS else ""
            which = "" if len(layers) == total else f", {len(layers)} of {total} matrices ({numbers}{more})"
            yield f"'{site}'{which}", why


def _of_assumptions(block: Block) -> list[str]:
    """Experts that no token was sent to."""
    unseen = {layer: "" for layer in block.layers() if block.statistics(layer).is_assumed}
    return [
        f"layer {where}: no token of the calibration data was sent there; steps go by the weight's own error"
        for where, _ in _places(block, unseen)
    ]


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
