"""COCO's average precision of boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poa.tasks.dense.extras import require_metric_libraries
from poa.tasks.detection.cascade import Target

FIGURES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AR": "mar_100",
}
"""COCO's names of the figures, and torchmetrics'."""


class CocoMetric:
    """COCO's metric (`pycocotools`' summary), collected image by image.

    Args:
        class_names: by label, counted from 0.
        masks: whether masks are measured as well.

    Raises:
        DataError: torchmetrics or faster-coco-eval is not installed.
    """

    def __init__(self, class_names: Sequence[str], *, masks: bool) -> None:
        require_metric_libraries()
        from torchmetrics.detection import MeanAveragePrecision

        self.class_names = tuple(class_names)
        self.kinds = ("bbox", "segm") if masks else ("bbox",)
        # torchmetrics' own thresholds are rounded to float32: recalls of 1/5, 1/2, … then fall on their other side.
        self.metric: Any = MeanAveragePrecision(
            iou_type=self.kinds,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            class_metrics=True,
            backend="faster_coco_eval",
        )
        # Detections beyond the best 100 of an image are not counted; `max_detections` says so.
        self.metric.warn_on_many_detections = False

    def add(self, found: Target, truth: Target) -> None:
        """Counts an image.

        Args:
            found: `boxes` [M, 4] (left, top, right, bottom), `scores` [M], `labels` [M] from 0, with masks
                `masks` [M, h, w] (boolean).
            truth: `boxes`, `labels` and `masks` likewise, `iscrowd` and `area`.
        """
        self.metric.update([found], [truth])

    def figures(self) -> dict[str, float]:
        """Values 0-1; those of which the images have no object (of a size, of a class) are left out.

        `AP` is the mean over IoU 0.5 to 0.95, `AP50` and `AP75` are at one IoU, `APs`, `APm` and `APl` of objects of
        less than 32², 96² and of more pixels, `AP/CLASS` of one class; `AR` is the mean recall of the best 100
        detections of each image. Those of masks are called `mask AP` and so on.
        """
        found: dict[str, Tensor] = self.metric.compute()
        classes = found["classes"].reshape(-1).tolist()
        figures: dict[str, float] = {}
        for kind in self.kinds:
            theirs, ours = (f"{kind}_" if len(self.kinds) > 1 else ""), ("" if kind == "bbox" else "mask ")
            figures |= {f"{ours}{name}": float(found[f"{theirs}{key}"]) for name, key in FIGURES.items()}
            per_class = found[f"{theirs}map_per_class"].reshape(-1).tolist()
            figures |= {
                f"{ours}AP/{self.class_names[label]}": value for label, value in zip(classes, per_class, strict=True)
            }
        return {name: value for name, value in figures.items() if value >= 0.0}


def comparable(detections: Target) -> Target:
    """A detector's output for one image as `CocoMetric.add` takes it: on the CPU, labels from 0, masks cut at 0.5."""
    found = {name: value.detach().cpu() for name, value in detections.items() if name != "masks"}
    found["labels"] = found["labels"] - 1
    if "masks" in detections:
        found["masks"] = (detections["masks"][:, 0] > 0.5).to(torch.bool).cpu()
    return found
