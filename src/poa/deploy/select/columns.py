"""Figures of many rows at once, as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from poa.deploy.select.budget import Constraint, Figure
from poa.deploy.select.row import Row


class Columns:
    """The figures of rows, one array for each; NaN where a row does not have it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self._columns: dict[str, np.ndarray] = {}

    def values(self, figure: str) -> Float64[np.ndarray, "N"]:
        """The figure of that name."""
        if figure not in self._columns:
            found = [getattr(row, figure) for row in self.rows]
            self._columns[figure] = np.array([math.nan if each is None else each for each in found], dtype=np.float64)
        return self._columns[figure]

    def costs(self, figure: Figure) -> Float64[np.ndarray, "N"]:
        """The figure, less being better."""
        return figure.sign * self.values(figure.name)

    def meeting(self, constraints: Iterable[Constraint]) -> Bool[np.ndarray, "N"]:
        """Which rows meet every constraint; those without the figure do not."""
        found = np.ones(len(self.rows), dtype=bool)
        for each in constraints:
            found &= self.costs(each.figure) <= each.figure.sign * each.limit
        return found

    def excess(self, constraints: Iterable[Constraint]) -> Float64[np.ndarray, "N"]:
        """The sum of the shares of the limits by which each row is beyond them."""
        found = np.zeros(len(self.rows))
        for each in constraints:
            beyond = self.costs(each.figure) - each.figure.sign * each.limit
            found += np.maximum(0.0, beyond / (abs(each.limit) or 1.0))
        return found

    def preference(self) -> Int64[np.ndarray, "N"]:
        """Each row's place in the order of preference, 0 the best choice.

        By quality; of equal quality by latency (unknown ones last), then parameters, then the order of the space.
        """
        latency = np.nan_to_num(self.values("latency_ms"), nan=math.inf)
        order = np.lexsort((self.values("place"), self.values("num_params"), latency, -self.values("quality")))
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        return places

    def front(self, figures: Iterable[Figure]) -> Bool[np.ndarray, "N"]:
        """Which rows no other row beats: is nowhere worse and somewhere better. Equal rows beat each other not."""
        is_no_worse = np.ones((len(self.rows), len(self.rows)), dtype=bool)
        is_better = np.zeros_like(is_no_worse)
        for figure in figures:
            costs = self.costs(figure)
            is_no_worse &= costs[:, None] <= costs
            is_better |= costs[:, None] < costs
        is_unbeaten: np.ndarray = np.logical_not((is_no_worse & is_better).any(axis=0))
        return is_unbeaten

    def where(self, mask: Bool[np.ndarray, "N"]) -> tuple[Row, ...]:
        """The rows that are marked, in order."""
        return tuple(self.rows[index] for index in np.flatnonzero(mask).tolist())
