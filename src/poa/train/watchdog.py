"""A run that hangs ends itself, so that what started it can start it again."""

from __future__ import annotations

import faulthandler
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from poa.distributed import Ranks

HANGS_FOLDER = "hangs"
START_FACTOR = 5
"""How much longer the first step of a process may take: compiling, filling caches, waiting for other machines."""

_MAX_TICK_SECONDS = 1.0
_TICKS = 20
_REPORT_SECONDS = 10.0


class _Beat(NamedTuple):
    doing: str
    step: int
    factor: int


class Watchdog:
    """While it is open, the process ends with status 1 if it does not `beat` for the given time.

    Before, the stacks of all threads and what the process was doing go to standard error and are appended to
    `RUN/hangs/rank-R-step-S.txt`. `torchrun --max-restarts N` then starts all processes again.

    The time is a number of short sleeps of a thread, not a difference of clocks. However long the process was stopped
    (SIGSTOP, a closed lid), and whatever clock was set, that counts as one sleep. A thread that hangs while it holds
    the interpreter's lock stops this thread too and is not noticed; torch, NumPy and Pillow free it for long work.

    Args:
        minutes: how long a step, or anything else between two beats, may take; 0 watches nothing.
        folder: the run directory.
        ranks: the place of this process.
    """

    def __init__(self, minutes: float, folder: Path, ranks: Ranks) -> None:
        self.seconds = minutes * 60
        self.folder = folder
        self.ranks = ranks
        self._tick = min(_MAX_TICK_SECONDS, self.seconds / _TICKS)
        self._beat = _Beat("starting", 0, START_FACTOR)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str, step: int) -> None:
        """The process lives, and begins something new.

        Args:
            doing: what it does from now on, for the report.
            step: steps done.
        """
        last = self._beat
        self._beat = _Beat(doing, step, 1 if step == last.step + 1 else last.factor)

    def __enter__(self) -> Self:
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        last, num_ticks = self._beat, 0
        while not self._closed.wait(self._tick):
            beat = self._beat
            num_ticks = num_ticks + 1 if beat is last else 0
            last = beat
            if num_ticks * self._tick >= self.seconds * beat.factor:
                self._end(beat)

    def _end(self, beat: _Beat) -> None:
        """Reports and ends the process; also where the report hangs, on the disk that made the process hang."""
        report = threading.Thread(target=self._report, args=(beat,), daemon=True)
        report.start()
        report.join(_REPORT_SECONDS)
        os._exit(1)

    def _report(self, beat: _Beat) -> None:
        name = f"rank-{self.ranks.rank}-step-{beat.step}.txt"
        text = (
            f"error: process {self.ranks.rank} of {self.ranks.num_ranks} made no progress for "
            f"{self.seconds * beat.factor / 60:g} minutes. After step {beat.step} it began: {beat.doing}. It ends now; "
            f"its stacks follow, and are in {self.folder / HANGS_FOLDER / name}.\n"
        )
        _write_report(2, text)
        try:
            (self.folder / HANGS_FOLDER).mkdir(exist_ok=True)
            with (self.folder / HANGS_FOLDER / name).open("ab") as file:
                _write_report(file.fileno(), f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")
        except OSError as error:
            os.write(2, f"error: the stacks could not be written to the run directory: {error}.\n".encode())


def _write_report(handle: int, text: str) -> None:
    os.write(handle, text.encode())
    faulthandler.dump_traceback(handle, all_threads=True)
    os.write(handle, b"\n")
