"""What the results say of the machine."""

from __future__ import annotations

import platform
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
