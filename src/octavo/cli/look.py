"""Verbs that look: evaluate, sensitivity, verify, inspect, recipes, formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import options as opt
from octavo.cli.make import asked_recipe
from octavo.cli.screen import Screen
from octavo.errors import UserError, VerificationError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL-or-RUN", help="A model, or a run directory.")],
    task: opt.Tasks = None,
    batch_size: opt.BatchSize = None,
    max_length: opt.MaxLength = None,
    stride: opt.Stride = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a model, quantized or not, at tasks."""
    screen = Screen(json, quiet)
    if not task:
        raise UserError("nothing to evaluate: name a task, such as --task retrieval:pairs.jsonl")

    from octavo import pipeline
    from octavo.evaluate import Options, parse_tasks
    from octavo.export.run import is_run
    from octavo.report.clock import Clock
    from octavo.report.terminal import run_view
    from octavo.sources import LoadedModel, open_model

    clock = Clock()
    tasks = parse_tasks(task, Options(batch_size=batch_size or 32, max_length=max_length, stride=stride))
    with clock.phase("load"):
        if is_run(Path(model)):
            subject: pipeline.Run | LoadedModel
            subject = pipeline.load(model, device=device, trust_remote_code=trust_remote_code)
        else:
            subject = open_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with clock.phase("evaluate"):
        measures = pipeline.evaluate(subject, tasks.values(), track=screen.track)
    record = dataclasses.replace(pipeline.evaluation_record(subject, measures, clock), output="")  # nothing is written
    screen.show(run_view(record))
    screen.emit(record.to_json_object())


def sensitivity(
    model: opt.Model,
    recipe: opt.RecipeName,
    data: opt.Data = None,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", metavar="KIND:DATA", help="Judge by this task; fidelity on --data unless given."),
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="One of the task's metrics.")] = "",
    only: Annotated[str, typer.Option("--only", metavar="PATTERN", help="Look at these quantizers only.")] = "*",
    top: Annotated[int, typer.Option("--top", min=1, help="How many to name.")] = 5,
    judge_samples: Annotated[
        int, typer.Option("--judge-samples", min=1, help="Samples of --data that fidelity is judged on.")
    ] = 64,
    leave: opt.Leave = None,
    observer: opt.Observer = None,
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    max_length: opt.MaxLength = None,
    seed: opt.Seed = 0,
    target: opt.Target = "",
    processor: opt.Processor = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rank quantizers by what each one alone costs, and print what would leave the worst ones out."""
    screen = Screen(json, quiet)
    the_recipe = asked_recipe(recipe, leave, observer)  # before anything slow is imported
    if task is None and data is None:
        raise UserError("sensitivity needs something to judge by: --data (fidelity on its samples) or --task KIND:DATA")

    from octavo import pipeline
    from octavo.cli.work import Order, Wanted, quantized, task_options
    from octavo.evaluate import parse_task
    from octavo.report.terminal import leave_hint, sensitivity_table

    order = Order(
        model,
        the_recipe,
        leave=tuple(leave or ()),
        data=data,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        target=target,
        processor=processor,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    judge = parse_task(task or f"fidelity:{data}", task_options(order))
    if task is None:
        judge = pipeline.shortened(judge, judge_samples)
    wanted = Wanted(only)
    run = quantized(order, screen.track, on_plan=wanted.look, judge=judge)
    ranked, _ = pipeline.sensitivity(
        run, judge, metric=metric, only=lambda name: name in wanted.names, track=screen.track
    )
    screen.show(sensitivity_table(run.record.sensitivity, most=top))
    worst = [row.quantizer for row in ranked[:top] if row.cost > 0]
    screen.say(f"\nto leave them out:  {leave_hint(worst)}" if worst else "\nno quantizer costs anything here")
    screen.emit(run.record.to_json_object())


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory or an exported checkpoint.")],
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="The run it was made of; DIR itself when DIR is a run.")
    ] = None,
    data: opt.Data = None,
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    device: opt.Device = "cpu",
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read files back with code that shares nothing with their writer; compare every weight with the simulation."""
    from octavo import pipeline
    from octavo.cli.work import drawn
    from octavo.export.run import is_run
    from octavo.report.verification import verification_view
    from octavo.sources import open_data

    screen = Screen(json, quiet)
    run = run or (directory if is_run(directory) else None)
    if run is None:
        raise UserError(
            f"{directory} is not a run: say which run it was made of, --run RUN; a graph that was quantized into a "
            "file alone has none: quantize with a directory as --out, and export that"
        )
    simulated = pipeline.load(run, device=device, trust_remote_code=trust_remote_code)
    chosen = None
    if data is not None:
        chosen = drawn(open_data(data), simulated.loaded, batch_size=batch_size or 32, samples=samples, otherwise=64)
    result = pipeline.verify(directory, simulated, chosen, track=screen.track)
    screen.show(verification_view(result.to_json_object(), str(directory)))
    screen.emit(result.to_json_object())
    if not result.agrees:
        raise VerificationError(f"{directory} does not mean what was simulated")


def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run directory, any safetensors checkpoint, or an .onnx file.")
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every tensor, not only the account.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """List what is in a checkpoint: formats, shapes, sizes, suspicious scales."""
    from octavo.readers.inspect import inspect as look_inside
    from octavo.report.inspection import render_inspection

    screen = Screen(json, quiet)
    found = look_inside(directory).to_json_object()
    screen.show(render_inspection(found, with_entries=everything))
    screen.emit(found)


def recipes(json: opt.Json = False) -> None:
    """List the presets."""
    from octavo.report.terminal import recipes_table
    from octavo.spec.recipe import presets

    screen = Screen(json)
    screen.show(recipes_table(presets()))
    screen.emit({"schema": "octavo.recipes/1", "recipes": [recipe.to_dict() for recipe in presets()]})


def formats(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Only those with such a name: 'nvfp4*'.")] = "*",
    json: opt.Json = False,
) -> None:
    """List the tensor formats that recipes can name: bits, errors, and the layouts and engines that take them."""
    from octavo.cli.catalogue import format_rows
    from octavo.report.formats import formats_table

    screen = Screen(json)
    rows = format_rows(pattern)
    screen.show(formats_table(rows))
    screen.emit({"schema": "octavo.formats/1", "formats": {row.name: row.to_json_object() for row in rows}})
