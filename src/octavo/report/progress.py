"""Progress with time left. Everything that takes long goes through a ``Track``; only the command line shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Track(Protocol):
    """Gives out ``items`` one by one and tells somebody how far it is."""

    def __call__(self, items: Iterable[T], description: str) -> Iterable[T]:
        """``items``, unchanged."""
        ...


def silent(items: Iterable[T], description: str) -> Iterable[T]:
    """The track that tells nobody."""
    return items


class TerminalTrack:
    """A bar with counts, elapsed time and time left; it disappears when done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, items: Iterable[T], description: str) -> Iterator[T]:
        """See ``Track``."""
        total = len(items) if isinstance(items, Sized) else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            for item in items:
                yield item
                progress.advance(task)
