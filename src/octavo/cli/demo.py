"""``octavo demo``: the headline case on the embedded CLIP, from plan to verified files."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import octavo.cli.work as work
from octavo import pipeline
from octavo.cli.screen import Screen
from octavo.errors import VerificationError
from octavo.evaluate import parse_task, parse_tasks
from octavo.report.clock import Clock
from octavo.report.plan_view import plan_view
from octavo.report.terminal import comparison_table, leave_hint, sensitivity_table
from octavo.report.verification import verification_view
from octavo.report.words import bytes_text, seconds_text
from octavo.spec.recipe import load_recipe
from octavo.spec.records import runs_to_json_object

MODEL = "demo:clip"
RECIPE = "fp8-attention"
LEFT_OUT = "*patch_embedding*"
TASKS = ("shapes-100=zeroshot:demo:shapes-100", "shapes-1k=zeroshot:demo:shapes-1k", "scenes=retrieval:demo:scenes")
BATCH_SIZE = 512
_NUM_JUDGES = 64
_NUM_WORST = 5


def run_demo(screen: Screen, *, out: Path | None, samples: int, device: str) -> None:
    """Plan, quantize everywhere, name the most sensitive quantizers, leave a layer out, export and verify.

    Args:
        screen: Where it is told.
        out: Where the two runs are kept; ``None``: nowhere.
        samples: Image-text pairs for calibration.
        device: Where the model runs.

    Raises:
        VerificationError: the files do not mean what was simulated.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-demo-") as scratch:
        _run(screen, out or Path(scratch), samples, device, is_kept=out is not None)


def _run(screen: Screen, place: Path, samples: int, device: str, *, is_kept: bool) -> None:
    order = work.Order(
        MODEL, load_recipe(RECIPE), data="demo:calibration", samples=samples, batch_size=BATCH_SIZE, device=device
    )
    tasks = list(parse_tasks(TASKS, work.task_options(order)).values())
    screen.show(f"[bold]1. FP8 everywhere[/]: {samples:,} pairs in batches of {BATCH_SIZE}; then three tasks\n")
    clock = Clock()
    with clock.phase("load"):
        loaded = work.opened(order)
        data = work.calibration(order, loaded)
    everywhere = pipeline.quantize(
        loaded,
        order.recipe,
        data,
        tasks=tasks,
        layouts=["modelopt"],
        clock=clock,
        track=screen.track,
        on_plan=lambda the_plan: screen.show(plan_view(the_plan)),
    )
    _write(everywhere, place / RECIPE, clock, is_kept=is_kept)
    _show_sensitivity(screen, everywhere, order)

    screen.show(f"\n[bold]3. The same, {LEFT_OUT} left as it is[/]")
    everywhere.door.strip()
    second = Clock()
    left = pipeline.quantize(
        loaded,
        order.recipe.leave(LEFT_OUT, why="left out on the command line", origin=f"--leave '{LEFT_OUT}'"),
        data,
        tasks=tasks,
        layouts=["modelopt"],
        clock=second,
        track=screen.track,
        baseline=everywhere.baseline,
    )
    left.record = dataclasses.replace(left.record, leave=(LEFT_OUT,))
    _write(left, place / f"{RECIPE}-left", second, is_kept=is_kept)
    runs = {RECIPE: everywhere.record, f"{RECIPE}, {LEFT_OUT} left out": left.record}
    screen.show("")
    screen.show(comparison_table(runs))

    checkpoint = place / f"{RECIPE}-left" / "modelopt"
    result = pipeline.verify(checkpoint, left, [next(iter(data or ()))], track=screen.track)
    screen.show(f"\n[bold]4. Files[/]: {_sizes(left)}")
    screen.show(verification_view(result.to_json_object(), "modelopt checkpoint"))
    total = sum(everywhere.record.seconds.values()) + sum(left.record.seconds.values())
    screen.show(f"\n{seconds_text(total)} in all" + (f"; runs kept in {place}" if is_kept else ""))
    screen.emit(runs_to_json_object(runs))
    if not result.agrees:
        raise VerificationError(f"{checkpoint} does not mean what was simulated")


def _sizes(run: pipeline.Run) -> str:
    return f"{bytes_text(run.record.bytes_before)} -> {bytes_text(run.record.bytes_after)}"


def _write(run: pipeline.Run, path: Path, clock: Clock, *, is_kept: bool) -> None:
    with clock.phase("export"):
        pipeline.save(run, path)
        pipeline.export(run, path / "modelopt", layout="modelopt")
    run.record = dataclasses.replace(
        run.record, seconds=dict(clock.seconds), output=run.record.output if is_kept else ""
    )


def _show_sensitivity(screen: Screen, run: pipeline.Run, order: work.Order) -> None:
    judge = pipeline.shortened(parse_task("fidelity:demo:calibration", work.task_options(order)), _NUM_JUDGES)
    ranked, _ = pipeline.sensitivity(run, judge, track=screen.track)
    screen.show(f"\n[bold]2. The {_NUM_WORST} most sensitive quantizers[/], each alone, on {_NUM_JUDGES} pairs\n")
    screen.show(sensitivity_table(run.record.sensitivity, most=_NUM_WORST))
    screen.show(f"\nto leave them out:  {leave_hint([row.quantizer for row in ranked[:_NUM_WORST]])}")
