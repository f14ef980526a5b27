"""What all figures have in common: their colours, their axes, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ItemT = TypeVar("ItemT")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""


def new_figure(width: float, height: float, num_columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches with a row of axes, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, num_columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes)


def repeating(styles: Sequence[str], items: Iterable[ItemT]) -> Iterator[tuple[str, ItemT]]:
    """Every item with a style; the styles begin again where there are more items."""
    return ((styles[index % len(styles)], item) for index, item in enumerate(items))


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
