"""What the system tells: memory of processes, the processor, and whether others hold it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def peak_memory(load: Callable[[], Callable[[], object]], num_runs: int = 3) -> float | None:
    """Bytes of resident memory that opening a network and running it takes at the most, above what is in use now.

    Only right in a process that has done nothing else. None where the system does not tell (Windows).
    """
    before = _resident("VmRSS", resets=True)
    run = load()
    for _ in range(num_runs):
        run()
    after = _resident("VmHWM")
    return None if before is None or after is None else max(0.0, after - before)


def _resident(entry: str, *, resets: bool = False) -> float | None:
    """Bytes; Linux's entry of that name, its peak reset if asked. Elsewhere the peak until now."""
    try:
        if resets:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(1024.0 * int(line.split()[1]) for line in status.splitlines() if line.startswith(entry))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def memory_of_process(command: Sequence[str]) -> float | None:
    """What a process prints that measures `peak_memory` and nothing else.

    Raises:
        RuntimeError: it failed; its last words are told.
    """
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"measuring memory failed: {' '.join(words) or f'exit status {done.returncode}'}")
    found: float | None = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def processor_name() -> str:
    """The name of this machine's processor, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for wanted in ("model name", "Hardware", "Model"):
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == wanted and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "cpu"


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_waited() -> float:
    """How long the main thread of this process was ready to run while others held the processors. Linux only."""
    try:
        return int(Path("/proc/self/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
