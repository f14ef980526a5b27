"""The rule of choice: the best quality that the budget allows, what comes next, and what would have to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from poa.deploy.select.budget import FIGURES, Constraint, Figure
from poa.deploy.select.columns import Columns
from poa.deploy.select.row import Row
from poa.errors import DataError

QUALITY = FIGURES["quality"]


@dataclass(frozen=True)
class RunnerUp:
    """Another choice within the budget, against the pick."""

    row: Row
    lost: dict[str, float]
    """By how much figures are worse than the pick's."""
    gained: dict[str, float]
    """By how much they are better."""


@dataclass(frozen=True)
class Relaxation:
    """Limits to give way so that something fits, all other limits kept."""

    limits: tuple[Constraint, ...]
    """The nearest that do."""
    row: Row
    """What is picked then."""


@dataclass(frozen=True)
class Selection:
    """A choice and everything that it was made from."""

    pick: Row | None
    """None: nothing fits."""
    fitting: tuple[Row, ...]
    """All rows within the budget, the pick first."""
    usable: tuple[Row, ...]
    """All rows that have the figures that are needed, in the order of the space."""
    left_out: dict[str, tuple[str, ...]]
    """The other sub-networks, each with the names of the figures that it lacks."""
    front: tuple[Row, ...]
    """Rows that none beats in all of `compared`, in the order of the space, whether they fit or not."""
    compared: tuple[Figure, ...]
    """Quality, every figure that is bounded, latency where all rows have it, parameters."""
    runner_ups: tuple[RunnerUp, ...]
    """The next of the front within the budget."""
    beyond: Row | None
    """Better than the pick, and the least beyond the budget in total relative excess."""
    relaxations: tuple[Relaxation, ...]
    """Where nothing fits: one for each limit that helps alone, or one of several limits together."""


def select(
    rows: Sequence[Row],
    constraints: Sequence[Constraint],
    *,
    num_runner_ups: int = 3,
    is_stand_in: bool = False,
) -> Selection:
    """The row of best quality among those that meet every constraint.

    Of equal quality the lower latency is taken, then fewer parameters, then the order of the space.

    Args:
        rows: the sub-networks; those without quality or a bounded figure are left out.
        constraints: the budget, at most one limit for each figure.
        num_runner_ups: how many are named.
        is_stand_in: quality is the number of parameters itself, which is then no cost.

    Raises:
        DataError: no row has all figures that are needed.
    """
    needed = tuple(dict.fromkeys((QUALITY, *(each.figure for each in constraints))))
    left_out = _lacking(rows, needed)
    columns = Columns([row for row in rows if row.subnet not in left_out])
    if not columns.rows:
        missing = dict.fromkeys(FIGURES[name].label for names in left_out.values() for name in names)
        raise DataError(f"no sub-network has all figures that are needed; some or all lack: {', '.join(missing)}.")
    rank, is_fitting = columns.preference(), columns.meeting(constraints)
    compared = _compared(columns, needed, is_stand_in=is_stand_in)
    is_front = columns.front(compared)
    fitting = [index for index in np.argsort(rank).tolist() if is_fitting[index]]
    pick = columns.rows[fitting[0]] if fitting else None
    others = [columns.rows[index] for index in fitting[1:] if is_front[index]]
    return Selection(
        pick=pick,
        fitting=tuple(columns.rows[index] for index in fitting),
        usable=columns.rows,
        left_out=left_out,
        front=columns.where(is_front),
        compared=compared,
        runner_ups=tuple(against(row, pick) for row in others[:num_runner_ups] if pick is not None),
        beyond=None if pick is None else _nearest_better(columns, constraints, pick),
        relaxations=() if fitting else relaxations(columns, constraints),
    )


def against(row: Row, pick: Row) -> RunnerUp:
    """What is lost and gained if `row` is taken instead; figures that both have."""
    lost: dict[str, float] = {}
    gained: dict[str, float] = {}
    for figure in FIGURES.values():
        ours, theirs = row.value(figure), pick.value(figure)
        if ours is None or theirs is None or ours == theirs:
            continue
        (lost if figure.sign * (ours - theirs) > 0 else gained)[figure.name] = abs(ours - theirs)
    return RunnerUp(row, lost, gained)


def relaxations(columns: Columns, constraints: Sequence[Constraint]) -> tuple[Relaxation, ...]:
    """The nearest limits under which something fits, where nothing does.

    For each constraint the limit nearest to its own under which something fits with all others kept. Where none helps
    alone: the limits that the row with the least total relative excess needs.
    """
    found = []
    for place, constraint in enumerate(constraints):
        others = [*constraints[:place], *constraints[place + 1 :]]
        costs = columns.costs(constraint.figure)[columns.meeting(others)]
        if len(costs):
            limit = constraint.figure.sign * float(costs.min())
            found.append(_relaxed(columns, others, (replace(constraint, limit=limit),)))
    if found:
        return tuple(found)
    nearest = columns.rows[_first(columns.excess(constraints), columns.preference())]
    broken = [each for each in constraints if not each.is_met(nearest.known(each.figure))]
    kept = [each for each in constraints if each not in broken]
    return (_relaxed(columns, kept, tuple(replace(each, limit=nearest.known(each.figure)) for each in broken)),)


def _lacking(rows: Sequence[Row], needed: Sequence[Figure]) -> dict[str, tuple[str, ...]]:
    """The sub-networks that lack a figure, with the names of what they lack."""
    names = [figure.name for figure in needed]
    lacking = {row.subnet: tuple(name for name in names if getattr(row, name) is None) for row in rows}
    return {subnet: names for subnet, names in lacking.items() if names}


def _compared(columns: Columns, needed: Sequence[Figure], *, is_stand_in: bool) -> tuple[Figure, ...]:
    """What the front is taken over: see `Selection.compared`."""
    found = dict.fromkeys(needed)
    if np.isfinite(columns.values("latency_ms")).all():
        found[FIGURES["latency_ms"]] = None
    if not is_stand_in:
        found[FIGURES["num_params"]] = None
    return tuple(found)


def _nearest_better(columns: Columns, constraints: Sequence[Constraint], pick: Row) -> Row | None:
    """Of the rows of better quality than the pick the one least beyond the budget; None where there is none."""
    is_worse = columns.values("quality") <= pick.known(QUALITY)
    if is_worse.all():
        return None
    excess = np.where(is_worse, np.inf, columns.excess(constraints))
    return columns.rows[_first(excess, columns.preference())]


def _relaxed(columns: Columns, kept: Sequence[Constraint], limits: tuple[Constraint, ...]) -> Relaxation:
    """The new limits with what is picked under them and those that are kept."""
    is_fitting = columns.meeting((*kept, *limits))
    return Relaxation(limits, columns.rows[_first(~is_fitting, columns.preference())])


def _first(key: np.ndarray, rank: np.ndarray) -> int:
    """The position of the smallest key; of equal ones that of the smallest rank."""
    return int(np.lexsort((rank, key))[0])
