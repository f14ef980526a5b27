"""Runs cases: what they raise, how long they take."""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.fuzzing.targets import EXPECTED, Target

CASE_SECONDS = 10.0
"""The longest that a case may take."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    target: str
    index: int
    result: str
    """`works`, `refused`, or the finding: the error's type, message and place."""
    seconds: float

    @property
    def is_finding(self) -> bool:
        """Whether something is to be mended."""
        return self.result not in ("works", "refused")


class TooLong(BaseException):
    """A case took longer than it may; nothing catches this by accident."""


def run_case(target: Target, seed: int, index: int, folder: Path) -> Outcome:
    """One case, in a folder that it may write into."""
    content = target.case(seed, index)
    began = time.monotonic()
    try:
        with _alarm(CASE_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(content, folder)
        result = "works"
    except EXPECTED:
        result = "refused"
    except (Exception, TooLong) as error:  # noqa: BLE001 (it is what is looked for)
        result = _told(error)
    return Outcome(target.name, index, result, time.monotonic() - began)


def plan(targets: list[Target], num_cases: int) -> list[tuple[Target, int]]:
    """How many cases each target gets, by its share; at least one each."""
    whole = sum(target.share for target in targets)
    return [(target, max(1, round(num_cases * target.share / whole))) for target in targets]


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _told(error: BaseException) -> str:
    """The error's type, its place in poa and the beginning of its message."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/poa/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/poa/')[2]}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:120]!r}"
