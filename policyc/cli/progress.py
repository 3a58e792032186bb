"""How far a build is, on stderr: a bar for people, lines for logs, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from emitters.core.progress import Lines, Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID

Form = Literal["auto", "plain", "json", "none"]


@contextmanager
def reporter(form: Form) -> Iterator[Progress]:
    """What a build reports to; `auto` is a bar on a terminal and lines elsewhere."""
    # A bar in a log file is a hundred lines of control characters.
    if form == "auto" and sys.stderr.isatty():
        with _display() as display:
            yield _Bar(display)
    elif form == "none":
        yield Silent()
    else:
        yield Lines(sys.stderr, as_json=form == "json")


class _Bar:
    """A bar for each stage; what an earlier run did counts from the beginning."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._task: TaskID | None = None

    def begin(self, stage: str, total: int, done: int) -> None:
        """Open a bar."""
        self._task = self._display.add_task(stage, total=total, completed=done)

    def advance(self, nbytes: int) -> None:
        """Move it."""
        if self._task is not None:
            self._display.advance(self._task, nbytes)

    def end(self) -> None:
        """Leave it where it is."""
        if self._task is not None:
            self._display.stop_task(self._task)


def _display() -> Display:
    # rich is loaded only where a person watches.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Display

    return Display(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
