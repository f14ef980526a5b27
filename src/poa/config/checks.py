"""Small validators that word their errors alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from poa.errors import ConfigError

MAX_CHANNELS = 65_536
"""The most channels that any layer of a model's configuration may have in its first stage."""
MAX_BLOCKS = 1_024
"""The most blocks of a stage."""
MAX_SIDE = 16_384
"""The longest side of an image, in pixels."""
MAX_SUBNETS = 100_000
"""The most sub-networks of a family."""
MAX_EMPHASIS = 1_000.0
"""The most often that one sub-network is drawn for each draw of another."""
MAX_SHOWN = 200
"""Characters of a wrong value that a message shows."""


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raises `ConfigError` naming the option, the value got and what is expected, unless `condition`."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}; got {shown(got)}.")


def shown(value: object) -> str:
    """The value as Python writes it, cut after `MAX_SHOWN` characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def require_bounded(values: object, bounds: Mapping[str, float], section: str = "model") -> None:
    """Raises `ConfigError` unless the fields named are at most their bounds, those of sequences one by one.

    What comes from a file is refused before memory is asked for.
    """
    for name, most in bounds.items():
        value = getattr(values, name)
        numbers = value if isinstance(value, tuple) else (value,)
        require(all(number <= most for number in numbers), f"{section}.{name}", value, f"at most {most:,}")


def require_few_subnets(*choices: Sequence[int]) -> None:
    """Raises `ConfigError` if the widths and the depths of all stages have more than `MAX_SUBNETS` combinations."""
    count = math.prod(map(len, choices))
    expected = f"so few that there are at most {MAX_SUBNETS:,} sub-networks"
    require(count <= MAX_SUBNETS, "model.widths and the depths", count, expected)


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
