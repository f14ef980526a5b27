"""Sheets of small pictures in rows and columns, laid out to the point."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR_MAP = "inferno"
"""Perceptually uniform, black to yellow."""

SMOOTH_SIDE = 96
"""Pixels of a map over an image at least."""

_GAP = 0.04
_GROUP_GAP = 0.16
_MARGIN = 0.1
_LINE = 0.16
_CHARACTER = 0.068
"""Width of a character of a heading, in inches."""


class Group(NamedTuple):
    """Columns that belong together."""

    heading: str
    """Over all of them."""
    columns: tuple[str, ...]
    """The title of each."""


class Sheet:
    """A figure whose axes are squares of one size, in rows with labels and in groups of columns with headings.

    Attributes:
        figure: the figure.
        axes: by row and column; they have no ticks and are invisible until something is shown in them.
    """

    def __init__(self, rows: Sequence[str], groups: Sequence[Group], title: str = "", tile: float = 1.3) -> None:
        from matplotlib.figure import Figure

        num_columns = sum(len(group.columns) for group in groups)
        widths = [len(group.columns) * (tile + _GAP) - _GAP for group in groups]
        texts = [_wrapped(group.heading, width + _GROUP_GAP) for group, width in zip(groups, widths, strict=True)]
        heading_lines = max(text.count("\n") + 1 if text else 0 for text in texts)
        has_titles = any(column for group in groups for column in group.columns)
        top = _MARGIN + (0.32 if title else 0) + _LINE * (heading_lines + has_titles) + 0.06 * bool(heading_lines)
        left = _MARGIN + max((len(line) for label in rows for line in label.split("\n")), default=0) * _CHARACTER
        width = left + sum(widths) + _GROUP_GAP * (len(groups) - 1) + _MARGIN
        height = top + len(rows) * (tile + _GAP) + _MARGIN
        self.figure: Figure = Figure(figsize=(max(width, len(title) * 0.1 + 2 * _MARGIN), height))
        self.axes = np.empty((len(rows), num_columns), dtype=object)
        self._tile, self._top, self._size = tile, top, self.figure.get_size_inches()
        self._text(_MARGIN, _MARGIN, title, size=12.0, ha="left", weight="bold")
        column, x = 0, left
        for group, group_width, text in zip(groups, widths, texts, strict=True):
            above = _LINE * has_titles + 0.06
            lines = text.count("\n") + 1
            self._text(x + group_width / 2, top - above - _LINE * lines, text, size=8.5, weight="bold")
            for name in group.columns:
                self._text(x + tile / 2, top - _LINE - 0.02, name, size=7.5)
                for row in range(len(rows)):
                    self.axes[row, column] = self._axis(x, top + row * (tile + _GAP))
                column, x = column + 1, x + tile + _GAP
            x += _GROUP_GAP - _GAP
        for row, label in enumerate(rows):
            middle = top + row * (tile + _GAP) + tile / 2
            self._text(left - 0.06, middle, label, size=7.5, ha="right", va="center")

    def show(self, row: int, column: int, picture: Shaped[np.ndarray, "h w 3"], *, smooth: bool = True) -> Axes:
        """Draws a picture (uint8, or 0-1) into its place; gives back the axes."""
        axis: Axes = self.axes[row, column]
        axis.set_visible(True)
        axis.imshow(picture, interpolation="antialiased" if smooth else "nearest")
        return axis

    def _axis(self, x: float, y: float) -> Axes:
        width, height = self._size
        box = (x / width, 1 - (y + self._tile) / height, self._tile / width, self._tile / height)
        axis = self.figure.add_axes(box, visible=False)
        axis.set_axis_off()
        return axis

    def _text(
        self, x: float, y: float, text: str, size: float, ha: str = "center", va: str = "top", weight: str = "normal"
    ) -> None:
        width, height = self._size
        place = (x / width, 1 - y / height)
        self.figure.text(*place, text, fontsize=size, ha=ha, va=va, fontweight=weight, linespacing=1.25)


def colour_image(pixels: UInt8[np.ndarray, "c s s"]) -> UInt8[np.ndarray, "s s 3"]:
    """The image in red, green and blue; grey is repeated, alpha is laid over white."""
    image = pixels.transpose(1, 2, 0)
    if image.shape[2] in (1, 2):
        return image[:, :, :1].repeat(3, axis=2)
    if image.shape[2] == 4:
        alpha = image[:, :, 3:] / 255.0
        image = np.rint(image[:, :, :3] * alpha + 255.0 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(image[:, :, :3])


def overlay(
    values: Float[np.ndarray, "h w"], pixels: UInt8[np.ndarray, "c s s"], weight: float = 0.7
) -> Float[np.ndarray, "S S 3"]:
    """The map in colour over the image in grey: scaled to its own 1-99 %, and to the image's size.

    The pixels of small images are repeated, for the map to be smooth.

    Args:
        values: one for each place.
        pixels: the image.
        weight: of the map; the rest is the image's.
    """
    from matplotlib import colormaps

    grid = torch.from_numpy(scaled(values)).double()[None, None]
    repeats = -(-SMOOTH_SIDE // pixels.shape[1])
    grey = colour_image(pixels).mean(axis=2, keepdims=True).repeat(repeats, axis=0).repeat(repeats, axis=1) / 255.0
    smooth = F.interpolate(grid, size=grey.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    return np.asarray(weight * colormaps[COLOUR_MAP](smooth)[:, :, :3] + (1 - weight) * grey)


def scaled(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The values from their 1st to their 99th percentile as 0 to 1, those beyond cut off; all 0 if they are equal."""
    low, high = np.percentile(values, (1, 99))
    if not high > low:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0))


def _wrapped(text: str, width: float) -> str:
    """Each line broken so that it fits a width in inches."""
    limit = max(8, int(width / _CHARACTER / 1.12))
    return "\n".join("\n".join(textwrap.wrap(line, limit)) for line in text.split("\n"))
