"""The Pareto front: rows that no other row beats in everything."""

from __future__ import annotations

from collections.abc import Sequence

from poa.deploy.select.budget import Figure
from poa.deploy.select.columns import Columns
from poa.deploy.select.row import Row


def pareto_front(rows: Sequence[Row], figures: Sequence[Figure]) -> tuple[Row, ...]:
    """The rows that no other row dominates in these figures, in the order given. Equal rows stay all.

    One row dominates another where it is nowhere worse and somewhere better.

    Args:
        rows: each of them has all these figures.
        figures: what is compared; of each less or more is better as it says.
    """
    columns = Columns(rows)
    return columns.where(columns.front(figures))
