"""Pictures of results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from poa.elastic import Subnet
from poa.evaluate.knn import KnnResult

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


def draw_front(axis: Axes, results: Sequence[KnnResult], references: Mapping[str, float]) -> None:
    """Best k-NN accuracy against parameters: a line for each width, a dashed line for each reference."""
    by_width: dict[int, list[KnnResult]] = defaultdict(list)
    for result in results:
        by_width[Subnet.parse(result.subnet).width].append(result)
    for colour, (width, members) in repeating(COLOURS, sorted(by_width.items())):
        sizes = [member.num_params for member in members]
        axis.plot(sizes, [100 * member.best for member in members], "o-", color=colour, label=f"width {width}")
        for member, size in zip(members, sizes, strict=True):
            depth = member.subnet.split("-", 1)[1]
            axis.annotate(depth, (size, 100 * member.best), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    for style, (name, value) in repeating(("--", ":", "-."), references.items()):
        axis.axhline(100 * value, color="0.4", linestyle=style, linewidth=1, label=f"{name} {value:.1%}")
    axis.set_xscale("log")
    axis.set_xlabel("parameters")
    axis.set_ylabel("k-NN accuracy, %")
    axis.set_title("Every sub-network of one run")
    axis.legend(fontsize=8, frameon=False)


def draw_curves(loss_axis: Axes, knn_axis: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """The loss, and the monitor's k-NN of three sub-networks, over the steps of a run."""
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    loss_axis.plot(*zip(*losses, strict=True), color=COLOURS[0])
    loss_axis.set_xlabel("step")
    loss_axis.set_title("Loss")
    looks = [(line["step"], line["monitor"]) for line in metrics if "monitor" in line]
    for colour, subnet in repeating(COLOURS, looks[0][1] if looks else ()):
        values = [100 * found[subnet].get("knn", float("nan")) for _, found in looks]
        knn_axis.plot([step for step, _ in looks], values, "o-", markersize=3, color=colour, label=subnet)
    knn_axis.set_xlabel("step")
    knn_axis.set_ylabel("k-NN accuracy on training images, %")
    knn_axis.set_title("While training")
    if looks:
        knn_axis.legend(fontsize=8, frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
