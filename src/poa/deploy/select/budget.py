"""Budgets as values: the figures that can be bounded, limits on them, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from poa.errors import ConfigError

MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}
"""Units of time, in milliseconds."""
COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
"""Letters after a number of parameters or operations."""
MB = {
    **{"B": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3, "TB": 1e6},
    **{"KiB": 2**10 / 1e6, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6, "TiB": 2**40 / 1e6},
}
"""Units of memory, in megabytes of 10⁶ bytes."""
RATES = {"": 1.0, "/s": 1.0}
SHARES = {"": 1.0, "%": 0.01}

_NUMBER = re.compile(
    r"\s*(?P<number>[+-]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(?P<unit>\D*?)\s*", re.I
)


def parse(text: str, units: Mapping[str, float], option: str, forms: str, *, may_be_negative: bool = False) -> float:
    """The number that `text` gives, in the unit whose factor is 1. Units are read in any case of letters.

    Args:
        text: a number and a unit, `8ms`.
        units: the factor of each unit.
        option: for the message.
        forms: valid examples, for the message.
        may_be_negative: whether 0 and negative numbers are valid.

    Raises:
        ConfigError: it is no number with one of these units, or not positive.
    """
    match = _NUMBER.fullmatch(text)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match["unit"].lower() not in factors:
        unit = "" if match is None else match["unit"]
        what = f"{unit!r} is no unit of it" if unit else "a number with its unit is needed"
        raise ConfigError(f"{option} {text!r}: {what}. Valid: {forms}.")
    value = float(match["number"]) * factors[match["unit"].lower()]
    if not math.isfinite(value) or (value <= 0 and not may_be_negative):
        raise ConfigError(
            f"{option} {text!r}: it must be {'finite' if may_be_negative else 'above 0'}. Valid: {forms}."
        )
    return value


def amount(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, no exponent in between."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def prefixed(value: float) -> str:
    """A count with a letter: 25.1M."""
    factor, letter = next(((COUNTS[each], each) for each in ("G", "M", "k") if abs(value) >= COUNTS[each]), (1.0, ""))
    return f"{amount(value / factor)}{letter}" if letter else f"{value:.0f}"


@dataclass(frozen=True)
class Figure:
    """Something that can be bounded.

    Attributes:
        name: the attribute of `Row` that holds it.
        label: what people call it.
        option: the option of `poa select` that bounds it.
        source: which file it comes from.
        read: a limit from what the user wrote.
        show: a value for people.
        is_minimum: whether the limit is the smallest value that is allowed, not the largest.
    """

    name: str
    label: str
    option: str
    source: Literal["card", "profile", "results"]
    read: Callable[[str], float]
    show: Callable[[float], str]
    is_minimum: bool = False

    @property
    def sign(self) -> float:
        """What a value is multiplied with so that less is better."""
        return -1.0 if self.is_minimum else 1.0


def _time(name: str, label: str, option: str) -> Figure:
    read = partial(parse, units=MS, option=option, forms="8ms, 0.5s, 250us")
    return Figure(name, label, option, "profile", read, lambda value: f"{amount(value)} ms")


def _count(name: str, label: str, option: str, forms: str) -> Figure:
    return Figure(name, label, option, "card", partial(parse, units=COUNTS, option=option, forms=forms), prefixed)


def _memory(name: str, label: str, option: str) -> Figure:
    read = partial(parse, units=MB, option=option, forms="30MB, 30MiB, 2GB, 500kB")
    return Figure(name, label, option, "profile", read, lambda value: f"{amount(value)} MB")


def _rate(name: str, label: str, option: str) -> Figure:
    read = partial(parse, units=RATES, option=option, forms="200 or 200/s (images per second)")
    return Figure(name, label, option, "profile", read, lambda value: f"{amount(value)} images/s", is_minimum=True)


def _quality(name: str, label: str, option: str) -> Figure:
    read = partial(parse, units=SHARES, option=option, forms="0.85, 85%", may_be_negative=True)
    return Figure(name, label, option, "results", read, lambda value: amount(value, 4), is_minimum=True)


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        _quality("quality", "quality", "--min-quality"),
        _time("latency_ms", "latency", "--max-latency"),
        _time("latency_p95_ms", "p95 latency", "--max-latency-p95"),
        _rate("throughput", "throughput", "--min-throughput"),
        _memory("peak_memory_mb", "peak memory", "--max-memory"),
        _memory("file_size_mb", "file size", "--max-size"),
        _count("num_params", "parameters", "--max-params", "25M, 300k, 1.2G, 25000000"),
        _count("flops", "FLOPs", "--max-flops", "1.2G, 500M, 4e9"),
    )
}
"""What can be bounded, in the order in which it is shown."""


@dataclass(frozen=True)
class Constraint:
    """A limit on a figure: a value equal to it is allowed."""

    figure: Figure
    limit: float

    def is_met(self, value: float) -> bool:
        """Whether the value is within the limit."""
        return self.figure.sign * value <= self.figure.sign * self.limit

    def excess(self, value: float) -> float:
        """By which share of the limit the value is beyond it; 0 within (absolute where the limit is 0)."""
        beyond = self.figure.sign * (value - self.limit)
        return max(0.0, beyond / (abs(self.limit) or 1.0))

    def __str__(self) -> str:
        return f"{self.figure.label} {'≥' if self.figure.is_minimum else '≤'} {self.figure.show(self.limit)}"

    def option(self) -> str:
        """How `poa select` takes it, rounded to the side that lets in what fits exactly."""
        return f"{self.figure.option} {_spelt(self.figure, self.limit)}"


def constraint(name: str, text: str) -> Constraint:
    """The limit that a user wrote for the figure of that name.

    Raises:
        ConfigError: `text` is not of its form.
    """
    return Constraint(FIGURES[name], FIGURES[name].read(text))


def _spelt(figure: Figure, value: float) -> str:
    """The value as the option takes it, to four digits, rounded away from what it shuts out."""
    factor, unit = _written_in(figure, value)
    number = value / factor
    step = 10.0 ** (math.floor(math.log10(abs(number))) - 3) if number else 1.0
    rounded = (math.floor if figure.is_minimum else math.ceil)(number / step) * step
    text = f"{rounded:.4g}" if abs(rounded) < 1e4 else f"{rounded:.0f}"
    return f"{text}{unit}" if Constraint(figure, figure.read(f"{text}{unit}")).is_met(value) else f"{number!r}{unit}"


def _written_in(figure: Figure, value: float) -> tuple[float, str]:
    if figure.source == "card":
        return next(((COUNTS[each], each) for each in ("G", "M", "k") if value >= COUNTS[each]), (1.0, ""))
    return 1.0, {"ms": "ms", "mb": "MB"}.get(figure.name.rsplit("_", 1)[-1], "")
