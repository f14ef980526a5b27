"""How large the images of a source are, as a picture."""

from __future__ import annotations

from pathlib import Path

from poa.data.tools.check import Findings
from poa.figures import COLOURS, new_figure, save_figure

_NUM_BINS = 40


def plot_sizes(found: Findings, path: Path) -> None:
    """Writes histograms of the shorter sides and of width over height as PNG."""
    figure, axes = new_figure(8, 2.6, 2)
    for axis, values, label in zip(
        axes,
        (found.short_sides, found.aspect_ratios),
        ("shorter side in pixels", "width / height"),
        strict=True,
    ):
        axis.hist(values, bins=_NUM_BINS, color=COLOURS[0])
        axis.set_xlabel(label)
        axis.set_ylabel("images")
    if found.options.min_side:
        axes[0].axvline(found.options.min_side, color=COLOURS[1], label=f"{found.options.min_side} pixels")
        axes[0].legend(frameon=False)
    save_figure(figure, path)
