"""Measuring networks with Python 3.9 or newer, numpy and onnxruntime alone.

`poa profile --bundle` copies this folder into the kit; poa itself measures with the same functions. Hence nothing of
poa is imported here, and its own parts by their place beside each other.
"""

from .machine import num_processors, peak_memory, processor_name
from .timing import Timing, percentile, time_in_turn, timed, warm_up

__all__ = [
    "Timing",
    "num_processors",
    "peak_memory",
    "percentile",
    "processor_name",
    "time_in_turn",
    "timed",
    "warm_up",
]
