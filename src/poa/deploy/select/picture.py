"""The picture of a selection: quality against the cost that matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poa.deploy.select.budget import FIGURES, Figure
from poa.deploy.select.front import pareto_front
from poa.deploy.select.join import described
from poa.deploy.select.pick import QUALITY
from poa.deploy.select.row import Row
from poa.deploy.select.words import Choice
from poa.figures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 60
"""From this number on points are drawn smaller."""
LOG_RATIO = 8.0
"""From this ratio of the largest to the smallest cost on the axis is logarithmic."""


def save_selection(path: Path, choice: Choice) -> None:
    """Writes a PNG file: all sub-networks, the front of the drawn cost, the budget, the pick and its runner-ups."""
    figure, (axis,) = new_figure(7.5, 4.8, 1)
    draw_selection(axis, choice)
    save_figure(figure, path)


def drawn_cost(choice: Choice) -> Figure:
    """The first cost that is bounded; else latency where it is known, else parameters."""
    bounded = [each.figure for each in choice.constraints if not each.figure.is_minimum]
    has_latency = all(row.latency_ms is not None for row in choice.selection.usable)
    return bounded[0] if bounded else FIGURES["latency_ms" if has_latency else "num_params"]


def draw_selection(axis: Axes, choice: Choice) -> None:
    """Draws it on the axis; see `save_selection`."""
    from matplotlib.ticker import LogLocator

    selection, cost = choice.selection, drawn_cost(choice)
    places = {row.place for row in selection.fitting}
    rest = [row for row in selection.usable if row.place not in places]
    _points(axis, rest, cost, color="white", edgecolors="0.55", label="beyond the budget" if rest else None)
    label = "within the budget" if places else None
    _points(axis, selection.fitting, cost, color=COLOURS[0], edgecolors=COLOURS[0], label=label)
    front = sorted(pareto_front(selection.usable, (QUALITY, cost)), key=lambda row: row.known(cost))
    _line(axis, front, cost)
    _budget(axis, choice, cost)
    _names(axis, choice, cost, front)
    costs = [row.known(cost) for row in selection.usable]
    if max(costs) >= LOG_RATIO * min(costs):
        axis.set_xscale("log", subs=[])
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: cost.show(value))
    axis.set_xlabel(cost.label)
    axis.set_ylabel("parameters" if choice.joined.is_stand_in else choice.joined.quality)
    if choice.joined.is_stand_in:
        axis.yaxis.set_major_formatter(lambda value, _: FIGURES["num_params"].show(value))
    setting = choice.joined.setting
    axis.set_title("" if setting is None else described(setting), fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def _points(axis: Axes, rows: Sequence[Row], cost: Figure, **look: str | None) -> None:
    places = [row.known(cost) for row in rows], [row.known(QUALITY) for row in rows]
    axis.scatter(*places, s=26 if len(rows) < MANY else 12, linewidths=0.9, zorder=3, **look)  # type: ignore[arg-type]


def _line(axis: Axes, front: Sequence[Row], cost: Figure) -> None:
    """The front as stairs: the best quality that may be had for a cost."""
    places = [row.known(cost) for row in front], [row.known(QUALITY) for row in front]
    axis.step(*places, where="post", color=COLOURS[0], alpha=0.5, linewidth=1.4, label="front")


def _budget(axis: Axes, choice: Choice, cost: Figure) -> None:
    for each in choice.constraints:
        if each.figure == cost:
            axis.axvline(each.limit, color=COLOURS[1], linestyle="--", linewidth=1.2, label=str(each))
        elif each.figure == QUALITY:
            axis.axhline(each.limit, color=COLOURS[3], linestyle="--", linewidth=1.2, label=str(each))
        else:
            axis.plot([], [], " ", label=f"and {each}")


def _names(axis: Axes, choice: Choice, cost: Figure, front: Sequence[Row]) -> None:
    """The pick as a star with its name, and the names of the runner-ups that are on the drawn front."""

    def write(row: Row, colour: str) -> None:
        # Nothing is better and cheaper than the front: there is room to its upper left.
        look = {"fontsize": 8, "color": colour, "ha": "right", "va": "center", "zorder": 6}
        place = row.known(cost), row.known(QUALITY)
        axis.annotate(row.subnet, place, (-8, 9), textcoords="offset points", **look)  # type: ignore[arg-type]

    for each in choice.selection.runner_ups:
        if each.row in front:
            write(each.row, "0.25")
    pick = choice.selection.pick
    if pick is not None:
        look = {"color": COLOURS[1], "markersize": 17, "markeredgecolor": "white", "zorder": 5, "label": "pick"}
        axis.plot(pick.known(cost), pick.known(QUALITY), "*", **look)  # type: ignore[arg-type]
        write(pick, COLOURS[1])
