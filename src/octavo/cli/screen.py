"""What goes to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.logging import RichHandler

if TYPE_CHECKING:
    from octavo.report.progress import Track


_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Warn about their own installation whenever transformers finds them, whatever is asked."""


@dataclass(frozen=True, slots=True)
class Screen:
    """How one command speaks.

    Args:
        as_json: One JSON object on standard output and no tables. Whatever else is printed from now on, by a model's
            own code for instance, goes to standard error.
        quiet: No progress and no tables.
    """

    as_json: bool = False
    quiet: bool = False
    _results: TextIO = field(default_factory=lambda: sys.stdout, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.as_json:
            sys.stdout = sys.stderr
        level = logging.ERROR if self.quiet else logging.WARNING
        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=True)
        logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)

    @property
    def track(self) -> Track:
        """Progress bars on standard error, where that is a terminal."""
        from octavo.report.progress import TerminalTrack, silent

        console = Console(stderr=True)
        return silent if self.quiet or not console.is_terminal else TerminalTrack(console)

    def show(self, view: RenderableType) -> None:
        """A result for a person."""
        if not (self.as_json or self.quiet):
            Console(file=self._results).print(view)

    def say(self, text: str) -> None:
        """One line of a result, never folded: paths and options are there to be copied."""
        if not (self.as_json or self.quiet):
            Console(file=self._results).print(text, soft_wrap=True, markup=False, highlight=False)

    def note(self, text: str) -> None:
        """What a person likes to know while waiting, on standard error."""
        if not (self.as_json or self.quiet):
            Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)

    def emit(self, value: Any) -> None:
        """A result for a program."""
        if self.as_json:
            print(json.dumps(value, indent=1, allow_nan=False), file=self._results)
