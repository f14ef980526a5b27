"""The picture of a training on labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from poa.figures import COLOURS, new_figure, repeating, save_figure


def draw_history(history: Sequence[Mapping[str, float]], metric: str, best_epoch: int, path: Path) -> None:
    """Draws the losses and the figure over the epochs as a PNG file, the best epoch marked.

    Args:
        history: see `FitResult`.
        metric: the figure; those named `metric/…` are drawn beside it.
        best_epoch: counted from 1.
        path: the file.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(9.0, 3.6, num_columns=2)
    epochs = [line["epoch"] for line in history]
    names = list(history[0]) if history else []
    shown = (
        ("training loss", [name for name in names if name.startswith("loss/")], 1.0),
        (f"{metric}, %", [name for name in names if name == metric or name.startswith(f"{metric}/")], 100.0),
    )
    for axis, (label, lines, factor) in zip(axes, shown, strict=True):
        for colour, name in repeating(COLOURS, lines):
            values = [factor * line[name] for line in history]
            text = name.removeprefix("loss/").removeprefix(f"{metric}/")
            text = "mean" if text == metric and len(lines) > 1 else text
            axis.plot(epochs, values, ".-", color=colour, label=text)
        axis.axvline(best_epoch, color="0.5", linestyle=":", linewidth=1, label=f"best epoch, {best_epoch}")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
