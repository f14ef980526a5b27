"""Axes: from a column of numbers to a range, its ticks and the unit that it is read in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LOG_RATIO = 8.0
"""Positive numbers whose largest is this many times the smallest are drawn on a logarithmic axis, where asked for."""

NUM_TICKS = 6
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """An axis."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where the value lies: 0 at `low`, 1 at `high`."""
        low, high, at = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return (at - low) / (high - low)

    def described(self) -> dict[str, Any]:
        """The same for the page's script."""
        ticks = [[value, number(value)] for value in self.ticks]
        return {"low": self.low, "high": self.high, "log": self.is_log, "ticks": ticks}


@dataclass(frozen=True)
class Frame:
    """The place of a chart's two axes in a drawing, in pixels."""

    x: Scale
    y: Scale
    width: float = 340.0
    height: float = 190.0
    left: float = 46.0
    right: float = 12.0
    top: float = 10.0
    bottom: float = 24.0

    def across(self, value: float) -> float:
        """Where a value of the horizontal axis lies."""
        return round(self.left + self.x.share(value) * (self.width - self.left - self.right), 1)

    def down(self, value: float) -> float:
        """Where a value of the vertical axis lies."""
        return round(self.height - self.bottom - self.y.share(value) * (self.height - self.top - self.bottom), 1)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies."""
        return self.across(x), self.down(y)


def scale_of(values: Iterable[float], *, may_log: bool = False) -> Scale:
    """An axis over all values with some room at both ends; 0 to 1 without values."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if may_log and low > 0 and high / low >= LOG_RATIO:
        room = (high / low) ** 0.06
        return Scale(low / room, high * room, is_log=True, ticks=_log_ticks(low / room, high * room))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low - room if low < 0 or low > room else 0.0), high + room
    return Scale(low, high, is_log=False, ticks=_linear_ticks(low, high))


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten, or the powers alone where those are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = tuple(float(f"{each}e{power}") for power in powers for each in factors)
        inside = tuple(value for value in found if low <= value <= high)
        if len(inside) >= 3:
            break
    return inside


def number(value: float, digits: int = 4) -> str:
    """A number for people: at most `digits` significant digits, thousands set apart, no exponent in between."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}g}"
    text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def prefix_of(values: Iterable[float]) -> tuple[float, str]:
    """The factor and the letter in which a column of numbers is read well: that of its smallest number, at least."""
    smallest = min(values)
    return next(((factor, letter) for factor, letter in PREFIXES if smallest >= factor / 4), (1.0, ""))
