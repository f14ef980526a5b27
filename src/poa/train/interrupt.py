"""Stopping politely: Ctrl-C, SIGTERM and SIGUSR1 let the current step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Those that ask a run to save and stop. SIGUSR1 is what Slurm sends ahead of its time limit (`--signal=USR1@120`)."""


class Interrupt:
    """While it is open, the first of `STOP_SIGNALS` is only remembered; a second SIGINT stops at once.

    Attributes:
        signal: the signal that arrived, or None.
        on_signal: called when it arrives.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.on_signal: Callable[[], None] = _nothing
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signal module's signature)
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        self.on_signal()


def _nothing() -> None:
    """What happens beside remembering, by default."""
