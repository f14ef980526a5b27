"""Pictures of what detectors find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from poa.errors import ConfigError
from poa.tasks.dense.canvas import as_tensor
from poa.tasks.detection.cascade import Target
from poa.tasks.detection.data import CocoDataset
from poa.tasks.detection.metrics import comparable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.0
"""Inches of an image."""
_MAX_LEGEND = 10
"""Classes that colours tell apart; where there are more, every box has its class written on it."""


def shown_images(dataset: CocoDataset, number: int) -> list[int]:
    """That many images, or as many as there are with objects, evenly spread over the set."""
    full = [index for index in range(len(dataset)) if dataset.instances(index)]
    places = np.linspace(0, len(full) - 1, min(number, len(full))).round().astype(int)
    return [full[place] for place in places.tolist()]


@torch.inference_mode()
def detections_on(model: nn.Module, dataset: CocoDataset, indices: Sequence[int]) -> list[Target]:
    """What a detector in evaluation mode finds on these images, as `comparable` gives it."""
    device = next(model.parameters()).device
    return [comparable(model([as_tensor(dataset.load(index)).to(device).float() / 255.0])[0]) for index in indices]


def detection_picture(
    dataset: CocoDataset, indices: Sequence[int], found: Mapping[str, Sequence[Target]], *, min_score: float = 0.5
) -> Figure:
    """A row for each image: the truth on the left, then what every network found; needs no display.

    Args:
        dataset: of the images.
        indices: which images.
        found: by the network's name what `detections_on` gives for them.
        min_score: detections of a lower score are not drawn.

    Raises:
        ConfigError: no image is named.
    """
    from matplotlib.figure import Figure

    if not indices:
        raise ConfigError("a picture of detections needs the index of one image or more; got none.")
    images = [dataset.load(index) for index in indices]
    height = sum(_WIDTH * image.height / image.width for image in images)
    figure = Figure(figsize=((1 + len(found)) * _WIDTH, height + 0.6), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(found), squeeze=False)
    for row, (axes, image, index) in enumerate(zip(grid, images, indices, strict=True)):
        columns = [("annotated", dataset.truth(index))]
        columns += [(name, _best(targets[row], min_score)) for name, targets in found.items()]
        for axis, (name, objects) in zip(axes, columns, strict=True):
            # Boxes count from the corner of the first pixel, matplotlib from its middle.
            extent = (0.0, float(image.width), float(image.height), 0.0)
            axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255, extent=extent)
            axis.set_axis_off()
            _draw(axis, objects, dataset.class_names, extent)
            if row == 0:
                axis.set_title(name, fontsize=9)
    if len(dataset.class_names) <= _MAX_LEGEND:
        _add_legend(figure, dataset.class_names, min_score)
    return figure


def _best(objects: Target, min_score: float) -> Target:
    chosen = objects["scores"] >= min_score
    return {name: value[chosen] for name, value in objects.items()}


def _draw(axis: Axes, objects: Target, class_names: Sequence[str], extent: tuple[float, float, float, float]) -> None:
    """Boxes in the colours of their classes, with scores where there are some, and masks."""
    from matplotlib.patches import Rectangle

    for number, (box, label) in enumerate(zip(objects["boxes"].tolist(), objects["labels"].tolist(), strict=True)):
        colour = _colour(label)
        left, top, right, bottom = box
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.3))
        words = [class_names[label]] if len(class_names) > _MAX_LEGEND else []
        words += [f"{float(objects['scores'][number]):.2f}"] if "scores" in objects else []
        if words:
            axis.text(
                left, top, " ".join(words), fontsize=5, color="white", verticalalignment="top",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if "masks" in objects:
            mask = objects["masks"][number].numpy()
            axis.imshow(np.where(mask[..., None], np.array([*colour, 0.45]), 0.0), extent=extent)


def _add_legend(figure: Figure, class_names: Sequence[str], min_score: float) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=_colour(label), label=name) for label, name in enumerate(class_names)],
        loc="outside lower center",
        title=f"detections of a score of {min_score:g} or more",
        ncols=len(class_names),
        frameon=False,
    )


def _colour(label: int) -> tuple[float, float, float]:
    from matplotlib import colormaps

    palette = colormaps["tab10"]
    red, green, blue, _ = palette(label % palette.N)
    return red, green, blue
