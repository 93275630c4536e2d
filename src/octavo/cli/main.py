"""The command line: verbs, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from octavo.cli import look, make
from octavo.errors import OctavoError, UserError

app = typer.Typer(
    name="octavo",
    help="Quantize trained models after training, see what it cost and where, and write files that engines load.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

VERBS: tuple[Callable[..., None], ...] = (
    make.plan,
    make.quantize,
    make.export,
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


def main() -> None:
    """Entry point. Exit status: 0, 2 for a user's mistake, 1 otherwise."""
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
