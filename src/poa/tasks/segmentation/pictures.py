"""Pictures of segmented images."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from poa.errors import ConfigError
from poa.tasks.segmentation.data import IGNORED, DenseImages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (
    "#56b4e9", "#8c510a", "#000075", "#808080", "#f4a6c8", "#2e8b2e", "#e69f00", "#c8b400", "#d62728", "#6a3d9a",
    "#00a6a6", "#b2df8a", "#fb9a99", "#1f78b4", "#ffd92f", "#b15928", "#4d4d4d", "#a6cee3", "#e7298a", "#66c2a5",
)  # fmt: skip
_LEFT_OUT = (255, 255, 255)
_GOLDEN = 0.618033988749895
_INCHES = 2.6


def class_colours(num_classes: int) -> UInt8[np.ndarray, "256 3"]:
    """A colour for each class, the same in every picture; white where a pixel is left out."""
    found = np.full((256, 3), _LEFT_OUT, dtype=np.uint8)
    for number in range(num_classes):
        if number < len(_COLOURS):
            found[number] = [int(_COLOURS[number][place : place + 2], 16) for place in (1, 3, 5)]
        else:
            colour = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.5 + 0.5 * (number % 2), 0.9 - 0.25 * (number % 3))
            found[number] = [round(255 * part) for part in colour]
    return found


def shown_images(num_images: int, count: int) -> list[int]:
    """Indices of `count` images, or of all where there are fewer, evenly over all."""
    return sorted({int(place) for place in np.linspace(0, num_images - 1, min(count, num_images)).round()})


def segmentation_picture(
    images: DenseImages, indices: Sequence[int], predictions: Mapping[str, Sequence[UInt8[np.ndarray, "_ _"]]]
) -> Figure:
    """A row for each image: itself, the truth, and what each network finds, with a legend of the classes shown.

    Args:
        images: of which some are shown.
        indices: which.
        predictions: by title, the classes found in each of the images shown.

    Raises:
        ConfigError: no image is named.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not indices:
        raise ConfigError("a picture of segmented images needs the index of one image or more; got none.")
    loaded = [images.load(index) for index in indices]
    colours = class_colours(len(images.class_names))
    columns = {"truth": [mask for _, mask in loaded], **predictions}
    shown = sorted(set(np.unique(np.concatenate([mask.ravel() for part in columns.values() for mask in part]))))
    legend_rows = -(-len(shown) // (2 * len(columns)))
    height = sum(_INCHES * image.height / image.width for image, _ in loaded) + 0.4 + 0.25 * legend_rows
    figure = Figure(figsize=(_INCHES * (1 + len(columns)), height), layout="constrained")
    grid = figure.subplots(len(loaded), 1 + len(columns), squeeze=False)
    for row, ((image, _), axes) in enumerate(zip(loaded, grid, strict=True)):
        axes[0].imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
        for axis, masks in zip(axes[1:], columns.values(), strict=True):
            axis.imshow(colours[masks[row]], interpolation="nearest")
        for axis in axes:
            axis.set_axis_off()
    for axis, title in zip(grid[0], ("image", *columns), strict=True):
        axis.set_title(title, fontsize=9)
    names = (*images.class_names, *("",) * (IGNORED - len(images.class_names)), "left out")
    patches = [
        Patch(facecolor=colours[number] / 255.0, edgecolor="0.6", linewidth=0.5, label=names[number])
        for number in shown
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2 * len(columns), fontsize=8, frameon=False)
    return figure
