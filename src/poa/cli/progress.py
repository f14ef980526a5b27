"""The commands' progress bars, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """A bar for everything that is reported."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int, loss: float | None = None) -> None:
        """How far it is."""
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total, loss="")
        text = "" if loss is None else f"loss {loss:.3f}"
        self.progress.update(self.tasks[what], completed=done, loss=text)

    def hide(self, what: str) -> None:
        """It is done."""
        if what in self.tasks:
            self.progress.remove_task(self.tasks.pop(what))


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars that vanish when the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console, transient=True) as progress:
        yield Bars(progress)
