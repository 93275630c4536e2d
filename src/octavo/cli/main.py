"""The command line: verbs, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from octavo.cli import look, make
from octavo.errors import OctavoError, UserError
from octavo.spec.version import VERSION

app = typer.Typer(
    name="octavo",
    help="Quantize trained models after training, see what it cost and where, and write files that engines load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

VERBS: tuple[Callable[..., None], ...] = (
    make.plan,
    make.quantize,
    make.export,
    make.convert,
    look.evaluate,
    look.sensitivity,
    look.verify,
    look.inspect,
    look.recipes,
    look.formats,
    make.demo,
)
for verb in VERBS:
    app.command()(verb)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"octavo {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exit status: 0, 2 for a user's mistake, 130 when interrupted, 1 otherwise."""
    try:
        app()
    except UserError as error:
        print(f"octavo: {error}", file=sys.stderr)
        sys.exit(2)
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
