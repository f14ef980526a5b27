"""How long networks take: warmed up, taking turns, in groups that fit in memory."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from .machine import seconds_waited
from .rows import COLUMNS, Row, merged, read_rows, text_of, write_rows


@dataclass(frozen=True)
class Opened:
    """A network that is ready to run."""

    run: Callable[[], object]
    """One forward pass on one batch, finished when it returns."""
    num_bytes: int
    """Of the file of its weights."""
    peak_memory: Callable[[], float | None]
    """Measures the memory that opening and running it takes above the idle runtime, in bytes; None: not known."""


@dataclass(frozen=True)
class Network:
    """What is measured."""

    subnet: str
    num_params: int
    flops: int
    opened: Callable[[], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class Timing:
    """How long is measured."""

    num_runs: int = 60
    """Timed forward passes of each network."""
    num_rounds: int = 6
    """Rounds through the networks; in each a network runs its share of the passes, one after the other."""
    max_seconds: float = 15.0
    """For each network: of slow ones fewer passes are timed, but at least two a round."""
    max_group: int = 16
    """Networks that are open at once: their rounds are interleaved."""
    max_group_bytes: float = 1e9
    """Weights that are open at once, where one network alone is not more."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds from some moment on."""


MAX_WAITED = 0.05
"""Share of the time waited for a processor, above which it is said."""
BUSY = "other processes held the processor for {:.0%} of the time. Measure again (--overwrite) when it is idle."

OnProgress = Callable[[int, int], None]
"""Called with the steps that are done and those there are."""


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


def profile(
    networks: Sequence[Network],
    setting: Row,
    out: Path,
    timing: Timing = Timing(),
    on_progress: OnProgress = no_progress,
) -> float:
    """Measures networks and writes their rows into the table, a group at a time: stopped, little is lost.

    Gives back the share of the time in which this process waited for a processor that others held (0 where the system
    does not tell): latencies are too long by about that.

    Args:
        networks: what is measured.
        setting: `device` and the other columns of the setting, and `poa_version`.
        out: the table; rows that are there stay, those of the same key are replaced.
        timing: how long.
        on_progress: called after each round and each measurement of memory.
    """
    steps = itertools.count(1)
    total = len(networks) * (1 + timing.num_rounds)
    waited = elapsed = 0.0

    def step() -> None:
        on_progress(next(steps), total)

    for group in groups(networks, timing):
        with ExitStack() as stack:
            opened = [stack.enter_context(each.opened()) for each in group]
            memory = []
            for found in opened:
                memory.append(found.peak_memory())
                step()
            started, waited_before = time.perf_counter(), seconds_waited()
            seconds = time_in_turn([found.run for found in opened], timing, step)
            waited += seconds_waited() - waited_before
            elapsed += time.perf_counter() - started
        rows = [
            measured_row(network, found.num_bytes, times, peak, setting)
            for network, found, times, peak in zip(group, opened, seconds, memory)  # noqa: B905 (Python 3.9)
        ]
        write_rows(out, merged(read_rows(out), rows))
    return waited / elapsed if elapsed else 0.0


def groups(networks: Sequence[Network], timing: Timing) -> list[list[Network]]:
    """The networks in groups that fit in memory, each with small and large ones.

    A slow change of the machine then spreads over all sizes and looks like no trend.
    """
    ordered = sorted(networks, key=lambda each: each.num_params)
    num_bytes = 4.0 * sum(each.num_params for each in ordered)
    count = max(math.ceil(len(ordered) / timing.max_group), math.ceil(num_bytes / timing.max_group_bytes))
    return [ordered[start::count] for start in range(min(count, len(ordered)))]


def time_in_turn(
    runs: Sequence[Callable[[], object]], timing: Timing, on_step: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Seconds of the timed forward passes of every network, all rounds together.

    Every network is warmed up until its time is stable. Then all take turns: in each round, of which every other one
    goes backwards, a network runs one pass untimed, for the caches, and its share of the timed passes.
    """
    num_runs = []
    for run in runs:
        estimate = warm_up(run, timing.clock)
        affordable = timing.max_seconds / timing.num_rounds / max(estimate, 1e-9)
        num_runs.append(max(2, int(min(-(-timing.num_runs // timing.num_rounds), affordable))))
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(timing.num_rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            runs[index]()
            seconds[index] += timed(runs[index], num_runs[index], timing.clock)
            on_step()
    return seconds


def timed(run: Callable[[], object], num_runs: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of `num_runs` calls, without Python's garbage collection."""
    seconds = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(num_runs):
            start = clock()
            run()
            seconds.append(clock() - start)
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def warm_up(run: Callable[[], object], clock: Callable[[], float], max_seconds: float = 3.0) -> float:
    """Runs until the medians of the last five calls and of the five before differ by 5 % at most.

    Gives up at 50 calls or after `max_seconds`, but not before the third call. Gives back the last median in seconds.
    """
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < max_seconds and len(seconds) < 50):
        seconds += timed(run, 1, clock)
        last, before = seconds[-5:], seconds[-10:-5]
        if len(before) == 5 and abs(median(last) - median(before)) <= 0.05 * median(before):
            break
    return median(seconds[-5:])


def measured_row(
    network: Network, num_bytes: int, seconds: Sequence[float], memory: float | None, setting: Row
) -> dict[str, str]:
    """The row of a network that was measured."""
    latency = median(seconds)
    values = {
        **setting,
        "subnet": network.subnet,
        "is_measured": True,
        **latency_columns(1e3 * latency, 1e3 * percentile(seconds, 0.95), int(setting["batch_size"])),
        "peak_memory_mb": None if memory is None else round(memory / 1e6, 3),
        "num_params": network.num_params,
        "flops": network.flops,
        "file_size_mb": num_bytes / 1e6,
        "fit_error": None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return {name: text_of(values[name]) for name in COLUMNS}


def latency_columns(latency_ms: float, p95_ms: float, batch_size: int) -> dict[str, float]:
    """The columns that follow from latencies; digits that mean nothing are left out."""
    return {
        "latency_ms": float(f"{latency_ms:.5g}"),
        "latency_p95_ms": float(f"{p95_ms:.5g}"),
        "throughput": float(f"{1e3 * batch_size / latency_ms:.5g}"),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def noise(batch_size: int, num_channels: int, image_size: int) -> np.ndarray:
    """A batch [B, c, h, w] of images to time on, float32 of mean 0 and variance 1: the time does not depend on them."""
    shape = (batch_size, num_channels, image_size, image_size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
