"""Progress with time left. Everything that takes long goes through a ``Track``; only the command line shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
Words = str | Callable[[], str]
"""What is being done: the same all the time, or asked for again and again while it is shown."""
_MEMORY_S = 7 * 86_400.0  # time left follows from the items of so long; rich forgets slow ones after half a minute


class Track(Protocol):
    """Gives out ``items`` one by one and tells somebody how far it is."""

    def __call__(self, items: Iterable[T], description: Words) -> Iterable[T]:
        """``items``, unchanged."""
        ...


def silent(items: Iterable[T], description: Words) -> Iterable[T]:
    """The track that tells nobody."""
    return items


class TerminalTrack:
    """A bar with counts, elapsed time and time left; it disappears when done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, items: Iterable[T], description: Words) -> Iterator[T]:
        """See ``Track``."""
        total = len(items) if isinstance(items, Sized) else None
        columns = (
            _Description(description),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, speed_estimate_period=_MEMORY_S) as progress:
            task = progress.add_task("", total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, refresh=True)


class _Description(ProgressColumn):
    """What is being done at this moment."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = words

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn.render``."""
        return Text(self.words if isinstance(self.words, str) else self.words())
