"""What the package says while it works: one logger, ``sida_ext``, and one kind of progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar", "console", "log", "progress_bar", "show_log"]

log = logging.getLogger("sida_ext")
# Bars, messages and errors; what a command answers goes to the standard output.
console = Console(stderr=True)


class Bar:
    """A progress bar under way."""

    def __init__(self, progress: Progress, label: str, total: int | None, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done: what ``progress=`` of :func:`sida_ext.pack` is called with."""
        self._progress.update(self._task, completed=done, total=total)

    def finish(self) -> None:
        """Nothing more will come: what is done is all there was to do."""
        (task,) = (task for task in self._progress.tasks if task.id == self._task)
        self._progress.update(self._task, total=task.completed)

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more are done; ``note`` stands at the bar's end until the next."""
        self._progress.update(self._task, advance=count, note=note)


@contextmanager
def progress_bar(label: str, total: int | None = None, *, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A bar on the standard error while the block runs.

    Args:
        total: steps in all; None: not known.
        done: steps that were done before.
        shown: False: the block gets a bar that nobody sees.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not shown) as progress:
        yield Bar(progress, label, total, done)


def show_log() -> None:
    """Show the package's messages as lines of the command; programs that import the package decide for themselves."""
    if not any(isinstance(handler, RichHandler) for handler in log.handlers):
        log.addHandler(RichHandler(console=console, show_time=False, show_level=False, show_path=False, markup=False))
    log.setLevel(logging.INFO)
    log.propagate = False
