"""What the results say of the machine, and the memory of this process."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import torch

from poa.version import __version__


def processor() -> str:
    """The processor's name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def describe_machine() -> dict[str, str]:
    """Processor, system and versions, for a result's record."""
    return {
        "processor": processor(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "poa": __version__,
    }


class AnonymousMemory:
    """The largest anonymous memory of this process while it is watched, in MiB. Linux only."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> AnonymousMemory:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) / 1024)
