"""Small validators that word their errors alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poa.errors import ConfigError


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raises `ConfigError` naming the option, the value got and what is expected, unless `condition`."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}; got {got!r}.")


def require_probability(name: str, value: float) -> None:
    """Raises `ConfigError` unless 0 ≤ value ≤ 1."""
    require(0.0 <= value <= 1.0, name, value, "a probability between 0 and 1")


def require_range(name: str, value: Sequence[float], low: float, high: float) -> None:
    """Raises `ConfigError` unless low ≤ value[0] ≤ value[1] ≤ high."""
    require(
        len(value) == 2 and low <= value[0] <= value[1] <= high,
        name,
        tuple(value),
        f"two numbers a ≤ b between {low:g} and {high:g}",
    )


def require_positive(name: str, value: float) -> None:
    """Raises `ConfigError` unless value is finite and > 0."""
    require(value > 0 and math.isfinite(value), name, value, "a finite number greater than 0")


def require_non_negative(name: str, value: float) -> None:
    """Raises `ConfigError` unless value is finite and ≥ 0."""
    require(value >= 0 and math.isfinite(value), name, value, "a finite number, 0 or more")


def require_rising(name: str, values: Sequence[int]) -> None:
    """Raises `ConfigError` unless the values are positive, in rising order and none twice."""
    require(
        bool(values) and list(values) == sorted(set(values)) and values[0] > 0,
        name,
        tuple(values),
        "positive numbers in rising order, none twice",
    )
