"""Semantic segmentation on any network: a linear head, or UPerNet."""

from poa.tasks.segmentation.data import SegmentationData, open_segmentation
from poa.tasks.segmentation.pictures import segmentation_picture, shown_images
from poa.tasks.segmentation.task import (
    SegmentationTask,
    SegmentReport,
    check_networks,
    known_report,
    train_segmentation,
)

__all__ = [
    "SegmentReport",
    "SegmentationData",
    "SegmentationTask",
    "check_networks",
    "known_report",
    "open_segmentation",
    "segmentation_picture",
    "shown_images",
    "train_segmentation",
]
