"""The figures: several networks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from poa.errors import DataError
from poa.evaluate.pictures.correspondence import Matches, are_shared, centres, mutual_matches
from poa.evaluate.pictures.pca import colours
from poa.evaluate.pictures.reading import Reading, heading_of, reference_of
from poa.evaluate.pictures.sheet import Group, Sheet, colour_image, overlay
from poa.figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "^", "s", "D", "v", "P")
"""With `COLOURS` the styles of 36 classes."""
MAX_CLASSES = 24
"""Classes with a colour and a line in the legend; the images of the others are grey."""


def across_sizes(readings: Sequence[Reading], title: str = "What shrinking loses") -> Figure:
    """A row for each image: the image, then every network's saliency and the colours of its patches.

    Colours follow the largest network's, see `colours`.
    """
    groups = [Group("", ("image",)), *(Group(heading_of(one), (_short(one), "PCA")) for one in readings)]
    shown = readings[reference_of(readings)].pixels
    sheet = Sheet([""] * len(shown), groups, title)
    painted = _colours(readings, only_foreground=False)
    for row, image in enumerate(shown):
        sheet.show(row, 0, colour_image(image))
        for number, (reading, colour) in enumerate(zip(readings, painted, strict=True)):
            values = reading.maps.saliency[row].numpy()
            sheet.show(row, 2 * number + 1, overlay(values, reading.pixels[row]))
            sheet.show(row, 2 * number + 2, colour[row], smooth=False)
    return sheet.figure


def _short(one: Reading) -> str:
    return one.maps.saliency_name.partition(" ")[0]


def draw_attention(readings: Sequence[Reading], title: str = "Attention of the class token, head by head") -> Figure:
    """For each image a row for every network: its saliency and its heads, see `Maps`; the image beside the first.

    Networks without a class token have no heads.
    """
    num_heads = max(0 if one.maps.attention is None else one.maps.attention.shape[1] for one in readings)
    columns = ("mean", *(f"head {head + 1}" for head in range(num_heads))) if num_heads else ("",)
    rows = [(image, one) for image in range(len(readings[0].pixels)) for one in readings]
    labels = [f"{one.name}\n{one.maps.saliency_name}" for _, one in rows]
    sheet = Sheet(labels, [Group("", ("image",)), Group("", columns)], title, tile=1.1)
    shown = readings[reference_of(readings)].pixels
    for row, (image, one) in enumerate(rows):
        if row % len(readings) == 0:
            sheet.show(row, 0, colour_image(shown[image]))
        heads = [] if one.maps.heads is None else list(one.maps.heads[image])
        for column, values in enumerate([one.maps.saliency[image], *heads], start=1):
            sheet.show(row, column, overlay(values.numpy(), one.pixels[image]))
    return sheet.figure


def draw_pca(
    readings: Sequence[Reading], title: str = "Patch vectors in colour", *, only_foreground: bool = False
) -> Figure:
    """A row for each image: the image, then the colours of every network's patches; see `colours`."""
    groups = [Group("", ("image",)), *(Group(heading_of(one), ("",)) for one in readings)]
    shown = readings[reference_of(readings)].pixels
    sheet = Sheet([""] * len(shown), groups, title, tile=1.6)
    painted = _colours(readings, only_foreground=only_foreground)
    for row, image in enumerate(shown):
        sheet.show(row, 0, colour_image(image))
        for column, colour in enumerate(painted, start=1):
            sheet.show(row, column, colour[row], smooth=False)
    return sheet.figure


def _colours(readings: Sequence[Reading], *, only_foreground: bool) -> list[Float[np.ndarray, "N _ _ 3"]]:
    patches = [one.maps.patches.numpy() for one in readings]
    return colours(patches, reference_of(readings), only_foreground=only_foreground)


class Agreement(NamedTuple):
    """How many of a reference network's matches another network makes too, over some pairs of images."""

    num_matches: int
    """The network's own."""
    num_shared: int | None
    """Those that are the reference's too; None where the networks' grids differ."""
    num_reference: int
    """The reference's."""

    @property
    def share(self) -> float | None:
        """Of the reference's matches, 0-1; None where the grids differ, or the reference has none."""
        return None if self.num_shared is None or not self.num_reference else self.num_shared / self.num_reference


def agreement(first: Sequence[Reading], second: Sequence[Reading]) -> list[Agreement]:
    """For each network how many of the largest one's mutual matches, over all pairs of images, are its own too.

    Args:
        first: the networks' readings of the first images.
        second: of the second images, as many, by the same networks in the same order.

    Raises:
        DataError: the readings do not belong together.
    """
    if [(one.name, len(one.pixels)) for one in first] != [(one.name, len(one.pixels)) for one in second]:
        raise DataError("matches need readings of as many first as second images, by the same networks.")
    reference = reference_of(first)
    target = _all_matches(first[reference], second[reference])
    num_reference = sum(len(part.first) for part in target)
    found = []
    for ours, theirs in zip(first, second, strict=True):
        own = _all_matches(ours, theirs)
        shared = None
        if _has_grids_of(ours, theirs, first[reference], second[reference]):
            shared = sum(int(are_shared(*pair).sum()) for pair in zip(own, target, strict=True))
        found.append(Agreement(sum(len(part.first) for part in own), shared, num_reference))
    return found


def draw_matches(
    first: Sequence[Reading], second: Sequence[Reading], k: int = 10, title: str = "The same place in two images"
) -> Figure:
    """A row for each pair of images, each network's `k` best mutual matches as lines between the two.

    Lines are solid where the largest network has the match too, dashed where it has not. Arguments and errors are
    those of `agreement`, whose figures are in the headings.
    """
    found = agreement(first, second)
    groups = [Group(f"{heading_of(one)}\n{_words(each)}", ("", "")) for one, each in zip(first, found, strict=True)]
    sheet = Sheet([""] * len(first[0].pixels), groups, title, tile=1.7)
    reference = reference_of(first)
    target = _all_matches(first[reference], second[reference])
    for number, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        for row, matches in enumerate(_all_matches(ours, theirs)):
            left = sheet.show(row, 2 * number, colour_image(ours.pixels[row]))
            right = sheet.show(row, 2 * number + 1, colour_image(theirs.pixels[row]))
            best = Matches(*(part[:k] for part in matches))
            solid = np.ones(len(best.first), dtype=bool)
            if found[number].num_shared is not None:
                solid = are_shared(best, target[row]).numpy()
            _connect(sheet.figure, (left, right), *_ends(ours, theirs, best), solid)
    return sheet.figure


def _words(found: Agreement) -> str:
    shared = "" if found.num_shared is None else f", {found.num_shared} shared"
    return f"{found.num_matches} matches{shared}"


def _all_matches(ours: Reading, theirs: Reading) -> list[Matches]:
    """The mutual matches of each pair."""
    pairs = zip(ours.maps.patches, theirs.maps.patches, strict=True)
    return [mutual_matches(one.flatten(1).T, other.flatten(1).T) for one, other in pairs]


def _has_grids_of(ours: Reading, theirs: Reading, first: Reading, second: Reading) -> bool:
    mine, wanted = ([one.maps.patches.shape[-2:] for one in pair] for pair in ((ours, theirs), (first, second)))
    return mine == wanted


def _ends(ours: Reading, theirs: Reading, found: Matches) -> tuple[np.ndarray, np.ndarray]:
    """The matched points in the two images."""
    sides = [one.maps.patches.shape[-2:] for one in (ours, theirs)]
    starts = centres(found.first, (sides[0][0], sides[0][1]), ours.pixels.shape[-1])
    stops = centres(found.second, (sides[1][0], sides[1][1]), theirs.pixels.shape[-1])
    return starts.numpy(), stops.numpy()


def _connect(figure: Figure, axes: tuple[Axes, Axes], starts: np.ndarray, stops: np.ndarray, solid: np.ndarray) -> None:
    """Draws the lines, coloured from the first image's left to its right."""
    from matplotlib import colormaps
    from matplotlib.patches import ConnectionPatch

    left, right = axes
    order = np.lexsort((starts[:, 1], starts[:, 0]))
    for share, row in zip(np.linspace(0.08, 0.92, len(order)), order, strict=True):
        colour, start, stop = colormaps["turbo"](share), starts[row], stops[row]
        style = "-" if solid[row] else (0, (3, 2))
        figure.add_artist(
            ConnectionPatch(
                start, stop, "data", "data", axesA=left, axesB=right, color=colour, linewidth=1.1, linestyle=style,
                arrowstyle="-", shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
        for axis, point in ((left, start), (right, stop)):
            axis.plot(*point, "o", color=colour, markersize=3.5, markeredgecolor="white", markeredgewidth=0.5)


def draw_prototypes(
    thumbnails: Mapping[int, UInt8[np.ndarray, "c s s"]],
    top: Mapping[str, Int[Tensor, "P k"]],
    names: Sequence[str] | None = None,
    title: str = "What prototypes like",
) -> Figure:
    """A row for each prototype: its top images, for every network.

    Args:
        thumbnails: the images by their position.
        top: for each network's heading the positions of the top images, see `top_images`.
        names: of the prototypes; they are counted from 1 by default.
        title: over the figure.
    """
    num_prototypes = len(next(iter(top.values())))
    labels = names or [f"prototype {row + 1}" for row in range(num_prototypes)]
    groups = [Group(heading, ("",) * found.shape[1]) for heading, found in top.items()]
    sheet = Sheet(labels, groups, title, tile=0.62)
    for row in range(num_prototypes):
        positions = [position for found in top.values() for position in found[row].tolist()]
        for column, position in enumerate(positions):
            sheet.show(row, column, colour_image(thumbnails[position]))
    return sheet.figure


def draw_embedding(
    points: Mapping[str, Float[np.ndarray, "N 2"]],
    labels: Int[np.ndarray, "N"] | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "The images as a map",
) -> Figure:
    """A map of the images for every network, coloured by class where there are classes.

    The `MAX_CLASSES` most frequent classes have a colour and marker; the images of others are grey.

    Args:
        points: for each network's heading its map, see `embed`.
        labels: classes, counted from 0.
        class_names: the name of each.
        title: over the figure.
    """
    num_images = len(next(iter(points.values())))
    figure, axes = new_figure(3.6 * len(points) + (1.3 if labels is not None else 0), 4.1, len(points))
    figure.suptitle(title, fontsize=12, fontweight="bold", ha="left", x=0.01)
    marks = _class_styles(np.zeros(num_images, dtype=np.int64) if labels is None else labels, class_names)
    for axis, (heading, place) in zip(axes, points.items(), strict=True):
        for name, colour, marker, members in marks:
            x, y = place[members].T
            axis.scatter(x, y, s=_dot(num_images), c=colour, marker=marker, linewidths=0, label=name)
        axis.set_title(heading, fontsize=8.5, fontweight="bold")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(visible=False)
        axis.set_aspect("equal", adjustable="datalim")
    if labels is not None:
        handles, names = axes[0].get_legend_handles_labels()
        legend = figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_sizes([28])  # type: ignore[attr-defined]
    return figure


def _dot(num_images: int) -> float:
    """Area of a point in square points: smaller the more there are."""
    return float(np.clip(6000 / num_images, 4, 40))


def _class_styles(
    labels: np.ndarray, class_names: Sequence[str] | None
) -> list[tuple[str, str, str, np.ndarray]]:  # name, colour, marker, the images' positions
    present, counts = np.unique(labels, return_counts=True)
    chosen = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    styles = [(colour, marker) for marker in MARKERS for colour in COLOURS]
    found = [
        (str(label) if class_names is None else class_names[label], *style, np.flatnonzero(labels == label))
        for label, style in zip(chosen.tolist(), styles[: len(chosen)], strict=True)
    ]
    rest = np.flatnonzero(~np.isin(labels, chosen))
    if len(rest):
        found.insert(0, (f"{len(present) - len(chosen)} others", "0.8", ".", rest))
    return found
