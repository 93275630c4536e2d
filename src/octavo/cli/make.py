"""Verbs that make something: plan, quantize, export, demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import options as opt
from octavo.cli.screen import Screen

if TYPE_CHECKING:
    import torch

    from octavo.spec.recipe import Recipe


def plan(
    model: opt.Model,
    recipe: opt.RecipeName,
    leave: opt.Leave = None,
    target: opt.Target = "",
    layout: Annotated[
        list[str] | None,
        typer.Option("--layout", metavar="L", help="Refuse what this checkpoint layout cannot hold. Repeatable."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every parameter in a row of its own.")] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="D", help="Shows what the model takes, where its files do not say."),
    ] = None,
    require_coverage: opt.RequireCoverage = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the plan as JSON.")] = None,
    processor: opt.Processor = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say what would happen: which parameter gets which format by which rule, or why it stays. Needs no data."""
    screen = Screen(json, quiet)
    the_recipe = asked_recipe(recipe, leave)  # before anything slow is imported

    from octavo import pipeline
    from octavo.cli.work import Order, opened, sample
    from octavo.report.clock import Clock
    from octavo.report.plan_view import plan_listing, plan_view
    from octavo.spec.coverage import check_coverage

    clock = Clock()
    order = Order(
        model,
        the_recipe,
        data=data,
        processor=processor,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    with clock.phase("load"):
        loaded = opened(order)
        batch = sample(order, loaded)
    with clock.phase("plan"):
        the_plan = pipeline.plan(loaded, the_recipe, sample=batch, target=target, layouts=layout or ())
    if require_coverage is not None:
        check_coverage(the_plan, require_coverage)
    if out is not None:
        _write_text(out, the_plan.to_json() + "\n")
    screen.show(plan_listing(the_plan) if everything else plan_view(the_plan))
    record = pipeline.plan_record(the_plan, loaded, leave or (), clock)
    screen.emit(record.to_json_object())


def quantize(
    model: opt.Model,
    recipe: opt.RecipeName,
    data: opt.Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="RUN",
            help="The run directory to write, or FILE.onnx; nothing without it.",
        ),
    ] = None,
    task: opt.Tasks = None,
    leave: opt.Leave = None,
    layout: opt.Layouts = None,
    require_coverage: opt.RequireCoverage = None,
    observer: opt.Observer = None,
    target: opt.Target = "",
    samples: opt.Samples = None,
    batch_size: opt.BatchSize = None,
    max_length: opt.MaxLength = None,
    stride: opt.Stride = None,
    seed: opt.Seed = 0,
    processor: opt.Processor = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Calibrate, simulate, evaluate and write: the whole way from a model to a run directory."""
    screen = Screen(json, quiet)
    the_recipe = asked_recipe(recipe, leave, observer)  # before anything slow is imported

    from octavo.cli.work import Order, quantized
    from octavo.report.plan_view import plan_summary
    from octavo.report.terminal import run_view

    order = Order(
        model=model,
        recipe=the_recipe,
        leave=tuple(leave or ()),
        data=data,
        tasks=tuple(task or ()),
        layouts=tuple(layout or ()),
        out=out,
        require_coverage=require_coverage,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        stride=stride,
        seed=seed,
        target=target,
        processor=processor,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    run = quantized(order, screen.track, on_plan=lambda the_plan: screen.note(f"plan: {plan_summary(the_plan)}"))
    screen.show(run_view(run.record))
    screen.emit(run.record.to_json_object())


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that `octavo quantize --out` wrote.")],
    layout: opt.Layout,
    out: opt.Out,
    target: opt.Target = "",
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="D", help="For onnx: shows what the model takes, where its files do not."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--float-dtype",
            "--dtype",
            help="What floating tensors that stay unquantized are cast to: bfloat16, float16.",
        ),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="For onnx: a language model takes keys and values of earlier tokens."),
    ] = True,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a checkpoint that inference engines load, from a run directory."""
    from octavo import pipeline
    from octavo.cli.work import with_batch
    from octavo.report.words import bytes_text

    screen = Screen(json, quiet)
    subject, batch = (run, None) if data is None else with_batch(run, data, trust_remote_code=trust_remote_code)
    written = pipeline.export(
        subject,
        out,
        layout=layout,
        target=target,
        sample=batch,
        dtype=float_dtype(dtype),
        use_cache=cache,
        trust_remote_code=trust_remote_code,
    )
    size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    screen.say(f"{layout} checkpoint, {bytes_text(size)}, written to {written}")
    screen.emit({"schema": "octavo.export/1", "layout": layout, "output": str(written), "file_bytes": size})


def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="What weights become: a name of `octavo formats`.")],
    out: opt.Out,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Take the weights of a run to another format without data, and say which values that changed."""
    from octavo.export.converted import convert_run
    from octavo.report.formats import conversion_table

    screen = Screen(json, quiet)
    changes = convert_run(run, to, out, trust_remote_code=trust_remote_code)
    inexact = [change for change in changes if change.num_changed]
    if inexact:
        screen.show(conversion_table([dataclasses.asdict(change) for change in inexact]))
    kept = len(changes) - len(inexact)
    screen.say(f"{kept} of {len(changes)} weights kept every value; run written to {out}")
    layers = [dataclasses.asdict(change) for change in changes]
    screen.emit({"schema": "octavo.conversion/1", "format": to, "output": str(out), "layers": layers})


def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Keep the runs here."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=512, help="Image-text pairs for calibration.")] = 8192,
    device: opt.Device = "cpu",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """The headline case on the embedded CLIP: plan, calibrate, FP8 everywhere and with a layer left out, verify."""
    from octavo.cli.demo import run_demo

    run_demo(Screen(json, quiet), out=out, samples=samples, device=device)


def asked_recipe(name: str, leave: list[str] | None, observer: str | None = None) -> Recipe:
    """The recipe with what the command line adds to it."""
    from octavo.spec.recipe import load_recipe

    recipe = load_recipe(name)
    if observer is not None:
        recipe = recipe.with_observer(observer)
    for pattern in leave or ():
        recipe = recipe.leave(pattern, why="left out on the command line", origin=f"--leave '{pattern}'")
    return recipe


def _write_text(path: Path, text: str) -> None:
    from octavo.errors import UserError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def float_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype called ``name``.

    Raises:
        UserError: not a floating dtype that weights are kept in.
    """
    import torch

    from octavo.errors import UserError

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in known:
        raise UserError(f"dtype '{name}' is not one of {', '.join(known)}")
    return None if name is None else known[name]
