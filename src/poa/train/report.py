"""What a run tells the person who watches it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Reporter:
    """Says nothing; subclasses say what they like."""

    def start(self, overview: Mapping[str, str], first_step: int, num_steps: int) -> None:
        """The run begins, or goes on after `first_step` steps."""

    def step(self, done: int, loss: float, images_per_second: float | None) -> None:
        """`done` steps are done; the speed is None before it is known."""

    def monitor(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """What the monitor saw, for each sub-network."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """No more steps in this process."""


class ConsoleReporter(Reporter):
    """A progress bar with loss, images per second and time left; plain lines where there is no terminal.

    Args:
        console: where to write; standard error by default.
        line_seconds: without a terminal, the time between two lines.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self.line_seconds = line_seconds
        self._last_line = -float("inf")
        self._num_steps = 0
        self._speed = 0.0
        self._progress = Progress(
            TextColumn("[bold]pre-training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def start(self, overview: Mapping[str, str], first_step: int, num_steps: int) -> None:
        """See `Reporter.start`."""
        table = Table.grid(padding=(0, 2))
        for name, value in overview.items():
            table.add_row(f"[bold]{name}", value)
        self.console.print(table)
        if first_step:
            self.console.print(f"Resuming after step {first_step} of {num_steps}.")
        self._num_steps = num_steps
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, loss="…", speed="")
        if self.console.is_terminal:
            self._progress.start()

    def step(self, done: int, loss: float, images_per_second: float | None) -> None:
        """See `Reporter.step`."""
        self._speed = images_per_second or self._speed
        speed = f"{self._speed:.1f} images/s" if self._speed else ""
        self._progress.update(self._task, completed=done, loss=f"{loss:.4f}", speed=speed)
        now = time.monotonic()
        due = now - self._last_line >= self.line_seconds or done == self._num_steps
        if not self.console.is_terminal and due:
            self._last_line = now
            left = self._progress.tasks[0].time_remaining
            remaining = f"  {left / 60:.1f} min left" if left else ""
            self.console.print(f"step {done}/{self._num_steps}  loss {loss:.4f}  {speed}{remaining}", soft_wrap=True)

    def monitor(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """See `Reporter.monitor`."""
        parts = []
        for subnet, figures in found.items():
            knn = f"k-NN {figures['knn']:.1%}, " if "knn" in figures else ""
            parts.append(f"{subnet}: {knn}RankMe {figures['rankme']:.1f}")
        self.console.print(f"after step {step}  " + "  ·  ".join(parts), soft_wrap=True)

    def message(self, text: str) -> None:
        """See `Reporter.message`."""
        self.console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """See `Reporter.stop`."""
        self._progress.stop()
