"""What is known of every sub-network, by column: its size, what it costs on devices, how good it is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from poa.deploy.profile.table import Setting, family_key, read_profile
from poa.deploy.report.scale import prefix_of, scale_of
from poa.deploy.select.budget import FIGURES
from poa.deploy.select.join import STAND_IN, SettingFilter, described, join
from poa.deploy.select.results import HEADLINES, Quality, is_quality, quality_of, read_results
from poa.deploy.select.row import Row
from poa.deploy.select.words import FORMATS
from poa.elastic import num_params
from poa.errors import ConfigError, DataError
from poa.family import FamilyCard

DEVICE_UNITS = {"latency_ms": "ms", "latency_p95_ms": "ms", "file_size_mb": "MB", "peak_memory_mb": "MB"}
"""The figures of a device that cost something, and the unit of each."""
PROTOCOLS = {"knn": "k-NN", "linear": "linear probe", "logistic": "logistic regression", "fewshot": "few-shot"}
"""How pages call protocols; others are called as they are."""
LABELS = {
    "health/cka": "CKA with the intact network",
    "health/neighbour_overlap": "neighbours shared with the intact network",
    "health/rankme": "RankMe",
    "health/rankme_share": "RankMe, share of the channels",
}
"""How pages call columns of results whose protocol need not be named."""
SHARES = ("accuracy", "map", "miou", "AP")
"""Figures that begin so are read in per cent."""
HEALTH = "health"


@dataclass(frozen=True)
class Column:
    """One number of every sub-network, in the order of the space; None where it is not known."""

    name: str
    label: str
    unit: str
    factor: float
    """How much one unit is: 1e6 for millions."""
    values: tuple[float | None, ...]
    limit: str = ""
    """The option of `poa select` that bounds it."""
    is_main: bool = True
    """Whether it is shown in tables and maps, not only to choose from."""

    @property
    def known(self) -> list[float]:
        """The numbers that are known, in units."""
        return [value / self.factor for value in self.values if value is not None]

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def decimals(self) -> int:
        """Digits after the point, for all numbers of the column: the smallest has three digits in all, a share four."""
        smallest = min((abs(value) for value in self.known if value), default=1.0)
        return min(6, max(0, (3 if self.unit == "%" else 2) - math.floor(math.log10(smallest))))

    def text(self, row: int) -> str:
        """The number of a sub-network, for people."""
        value = self.values[row]
        return "" if value is None else f"{value / self.factor:,.{self.decimals}f}"

    def described(self) -> dict[str, Any]:
        """The same for the page's script."""
        fields = ("name", "label", "unit", "factor", "values", "limit", "decimals")
        scale = scale_of(self.known, may_log=bool(self.limit)).described()
        return {name: getattr(self, name) for name in fields} | {"scale": scale, "main": self.is_main}


class Device(NamedTuple):
    """What the sub-networks cost in one setting of a profile."""

    label: str
    columns: tuple[Column, ...]
    sources: tuple[str, ...]
    """For each sub-network: measured, interpolated, or nothing."""
    fit_error: float | None
    """Of the interpolated latencies: relative."""
    options: str
    """Of `poa select`: what tells the setting from the others."""
    export: str
    """Options of `poa export` for the setting's runtime."""

    def described(self) -> dict[str, Any]:
        """The same for the page's script."""
        return self._asdict() | {"columns": [column.described() for column in self.columns]}


@dataclass(frozen=True)
class Points:
    """All that is known."""

    names: tuple[str, ...]
    """Of the sub-networks, in the order of the space."""
    sizes: tuple[Column, Column]
    """Parameters and operations."""
    devices: tuple[Device, ...]
    qualities: tuple[Column, ...]
    """Those that stand for a protocol first."""
    left_out: tuple[str, ...]
    """Networks of the results that are not this family's."""


def points_of(card: FamilyCard, results: Sequence[Path], profiles: Sequence[Path]) -> Points:
    """Puts together what a family's card and tables tell, with the rules of `poa select`.

    Args:
        card: the family's.
        results: tables that `poa evaluate … --csv` or a sweep wrote.
        profiles: tables that `poa profile` wrote.

    Raises:
        DataError: a table cannot be read, has nothing of this family, or tables contradict each other.
    """
    subnets = card.space.subnets
    layout = card.architecture.layout(card.config)
    sizes = {str(subnet): num_params(layout, subnet) for subnet in subnets}
    qualities, left_out = _qualities(card, sizes, results)
    return Points(
        names=tuple(sizes),
        sizes=(
            _size("num_params", sizes.values()),
            _size("flops", [card.flops(subnet) for subnet in subnets]),
        ),
        devices=_devices(card, profiles),
        qualities=tuple(qualities),
        left_out=left_out,
    )


def _size(name: str, counts: Iterable[int]) -> Column:
    values = tuple(map(float, counts))
    factor, letter = prefix_of(values)
    return Column(name, FIGURES[name].label, letter, factor, values, FIGURES[name].option)


def _qualities(card: FamilyCard, sizes: dict[str, int], files: Sequence[Path]) -> tuple[list[Column], tuple[str, ...]]:
    if not files:
        return [], ()
    rows = [row for file in files for row in read_results(file)]
    columns = dict.fromkeys(column for row in rows for column in row.figures if is_quality(column))
    found = [each for each in (_quality_of(card, sizes, files, column) for column in columns) if each is not None]
    if not found:
        raise DataError(
            f"{', '.join(map(str, files))}: of this family there is no figure that could be compared. `poa evaluate` "
            "writes some."
        )
    shown = [_quality(each.column, tuple(each.values.get(name) for name in sizes)) for each in found]
    return sorted(shown, key=lambda column: not column.is_main), found[0].others


def _quality_of(card: FamilyCard, sizes: dict[str, int], files: Sequence[Path], column: str) -> Quality | None:
    """The column's figures; None where it is of other networks alone."""
    try:
        return quality_of(card, sizes, files, column)
    except ConfigError:
        return None


def _quality(column: str, values: tuple[float | None, ...]) -> Column:
    protocol, _, figure = column.partition("/")
    is_share = figure.startswith(SHARES)
    words = f"{PROTOCOLS.get(protocol, protocol.replace('-', ' '))} {figure.replace('_', ' ')}"
    label = LABELS.get(column, words)
    is_main = figure == HEADLINES.get(protocol) or protocol == HEALTH
    return Column(column, label, "%" if is_share else "", 0.01 if is_share else 1.0, values, is_main=is_main)


def _devices(card: FamilyCard, files: Sequence[Path]) -> tuple[Device, ...]:
    if not files:
        return ()
    rows = [row for file in files for row in read_profile(file) if row.family == family_key(card)]
    settings = list(dict.fromkeys(row.setting for row in rows))
    if not settings:
        raise DataError(
            f"{', '.join(map(str, files))}: no row of this family ({family_key(card)}). `poa profile` writes them."
        )
    return tuple(_device(card, files, setting, settings) for setting in settings)


def _device(card: FamilyCard, files: Sequence[Path], setting: Setting, settings: Sequence[Setting]) -> Device:
    wanted = {name: value for name, value in setting._asdict().items() if name != "family"}
    rows = join(card, files, (), STAND_IN, SettingFilter(**wanted)).rows
    columns = [_cost(name, unit, rows) for name, unit in DEVICE_UNITS.items()]
    if setting.image_size != card.preprocessing.image_size:
        columns.append(_size("flops", [row.flops for row in rows]))
    apart = [name for name in wanted if len({getattr(each, name) for each in settings}) > 1]
    words = {True: "measured", False: "interpolated", None: ""}
    return Device(
        label=described(setting),
        columns=tuple(column for column in columns if column.known),
        sources=tuple(words[row.is_measured] for row in rows),
        fit_error=max((row.fit_error for row in rows if row.fit_error is not None), default=None),
        export=_export(setting, card),
        options="".join(f" --{name.replace('_', '-')} {shlex.quote(str(wanted[name]))}" for name in apart),
    )


def _export(setting: Setting, card: FamilyCard) -> str:
    size = "" if setting.image_size == card.preprocessing.image_size else f" --image-size {setting.image_size}"
    return f" --to {FORMATS.get(setting.runtime, setting.runtime)} --out exports{size}"


def _cost(name: str, unit: str, rows: Iterable[Row]) -> Column:
    figure = FIGURES[name]
    return Column(name, figure.label, unit, 1.0, tuple(row.value(figure) for row in rows), figure.option)
