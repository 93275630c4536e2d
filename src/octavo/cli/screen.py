"""What goes to the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        as_json: One JSON object on standard output and no tables.
        quiet: No progress and no tables.
    """

    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
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
            Console().print(view)

    def emit(self, value: Any) -> None:
        """A result for a program."""
        if self.as_json:
            print(json.dumps(value, indent=1, allow_nan=False))
