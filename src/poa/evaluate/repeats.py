"""Protocols that are repeated with other draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def mean_and_sd(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For every figure of the runs its mean, and as `NAME_sd` its standard deviation (n − 1; 0 for a single run)."""
    found: dict[str, float] = {}
    for name in runs[0]:
        values = np.asarray([run[name] for run in runs], dtype=np.float64)
        found[name] = float(values.mean())
        found[f"{name}_sd"] = float(values.std(ddof=1)) if len(runs) > 1 else 0.0
    return found
