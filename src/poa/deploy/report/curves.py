"""A run's curves as small charts: thinned, and laid out to the unit of the drawing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from poa.deploy.report.scale import Frame, Scale, number, scale_of

MAX_POINTS = 240
"""Of one curve: as many as a chart has columns of pixels."""

MONITOR = "monitor"


class Panel(NamedTuple):
    """A chart that every run has, where its numbers are."""

    title: str
    note: str
    names: Mapping[str, str]
    """Of the metrics, with the words for each."""
    prefix: str = ""
    """All metrics that begin so belong to it too."""
    may_log: bool = False
    """Whether the axis is logarithmic where the values span much."""


PANELS = (
    Panel("Loss", "What training minimises.", {"loss": "loss"}),
    Panel("Loss of the intact network", "Its parts before they are weighted.", {}, "loss/intact/"),
    Panel("Loss of the sub-networks", "Of those drawn; its parts before they are weighted.", {}, "loss/elastic/"),
    Panel(
        "Learning rate",
        "Of heads, their last layer and backbone, where they differ.",
        {"lr": "learning rate", "last_layer_lr": "last layer", "backbone_lr": "backbone"},
    ),
    Panel("Gradient norm", "Before clipping.", {}, "grad_norm/", may_log=True),
)
MONITOR_PANELS = {
    "knn": ("k-NN while training", "Accuracy of held-out training images, %.", 100.0),
    "rankme": ("RankMe while training", "Effective rank of the class vectors.", 1.0),
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> str:
        """The last value, for people."""
        return number(self.values[-1])


@dataclass(frozen=True)
class Chart:
    """Curves over steps, ready to be drawn."""

    title: str
    note: str
    curves: tuple[Curve, ...]
    frame: Frame
    has_dots: bool
    """Whether every point is marked: where they are few."""

    def points(self, curve: Curve) -> list[tuple[float, float]]:
        """The curve's points in the drawing."""
        return [self.frame.place(*pair) for pair in zip(curve.steps, curve.values, strict=True)]

    def described(self) -> dict[str, Any]:
        """What the page's script needs to read values off."""
        curves = [
            {"x": [int(step) for step in each.steps], "y": [float(f"{value:.4g}") for value in each.values]}
            for each in self.curves
        ]
        return {"low": self.frame.x.low, "high": self.frame.x.high, "curves": curves}


def charts_of(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of a run's metrics; curves that are 0 throughout, or the same as one before, are left out."""
    found = []
    for panel in PANELS:
        names = dict(panel.names) | {
            name: name.removeprefix(panel.prefix).replace("_", " ")
            for name in _names(lines)
            if panel.prefix and name.startswith(panel.prefix)
        }
        pairs = {
            label: [(float(line["step"]), float(line[name])) for line in lines if name in line]
            for name, label in names.items()
        }
        curves = [_curve(label, seen) for label, seen in pairs.items()]
        found.append(_chart(panel.title, panel.note, curves, may_log=panel.may_log))
    found += _monitor_charts([line for line in lines if MONITOR in line])
    return [chart for chart in found if chart.curves]


def _names(lines: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(name for line in lines for name in line)


def _monitor_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    subnets = _names(line[MONITOR] for line in lines)
    found = []
    for figure, (title, note, factor) in MONITOR_PANELS.items():
        curves = []
        for subnet in subnets:
            seen = [(float(line["step"]), line[MONITOR].get(subnet, {}).get(figure)) for line in lines]
            curves.append(_curve(subnet, [(step, factor * value) for step, value in seen if value is not None]))
        found.append(_chart(title, note, curves))
    return found


def _curve(label: str, pairs: Iterable[tuple[float, float]]) -> Curve:
    """The thinned curve of the pairs whose value is a number."""
    kept = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    steps, values = kept[thinned(kept[:, 1])].T
    return Curve(label, tuple(steps.tolist()), tuple(values.tolist()))


def thinned(values: Float[np.ndarray, "N"], max_points: int = MAX_POINTS) -> Int[np.ndarray, "K"]:
    """Which values to draw: all if they are few, else the first, the last, and the extremes of equal parts.

    No peak is lost, and no more than `max_points` + 2 remain.
    """
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    edges = np.linspace(0, count, max_points // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in itertools.pairwise(edges):
        part = values[start:stop]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    return np.array(sorted(kept))


def _chart(title: str, note: str, curves: Iterable[Curve], *, may_log: bool = False) -> Chart:
    shown: list[Curve] = []
    for curve in curves:
        is_twin = any((curve.steps, curve.values) == (other.steps, other.values) for other in shown)
        if any(curve.values) and not is_twin:
            shown.append(curve)
    last = max((step for curve in shown for step in curve.steps), default=1.0)
    ticks = tuple(tick for tick in scale_of([0.0, last]).ticks if tick <= last)
    y = scale_of((value for curve in shown for value in curve.values), may_log=may_log)
    few = all(len(curve.steps) <= MAX_POINTS // 8 for curve in shown)
    return Chart(title, note, tuple(shown), Frame(Scale(0.0, last, is_log=False, ticks=ticks), y), few)
