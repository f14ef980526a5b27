"""A quality of every sub-network as a map of widths and depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from poa.deploy.report.points import Column
from poa.elastic import SearchSpace

NUM_LEVELS = 10


class Cell(NamedTuple):
    """A sub-network's place in the map."""

    text: str
    level: int | str
    """0 for the lowest figure of the map, `NUM_LEVELS` − 1 for the highest; empty where there is none."""


@dataclass(frozen=True)
class HeatMap:
    """Widths by row, depths by column."""

    title: str
    depths: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell, ...]], ...]


def heat_map(space: SearchSpace, column: Column) -> HeatMap:
    """The map of a column's numbers, which are in the order of `space.subnets`."""
    known = column.known
    low, high = min(known), max(known)

    def cell(row: int) -> Cell:
        value = column.values[row]
        if value is None:
            return Cell("–", "")
        share = 1.0 if high == low else (value / column.factor - low) / (high - low)
        return Cell(column.text(row), min(NUM_LEVELS - 1, int(share * NUM_LEVELS)))

    count = len(space.depth_tuples)
    rows = (
        (width, tuple(cell(number * count + place) for place in range(count)))
        for number, width in enumerate(space.widths)
    )
    depths = tuple("-".join(map(str, depths)) for depths in space.depth_tuples)
    return HeatMap(column.title, depths, tuple(rows))
