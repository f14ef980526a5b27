"""Object detection and instance segmentation on any network, with torchvision's detectors and COCO's metric."""

from poa.tasks.dense.annotations import AnnotationCounts, Annotations, Instance, read_annotations
from poa.tasks.dense.extras import require_metric_libraries
from poa.tasks.detection.cascade import CascadeRoIHeads, Target
from poa.tasks.detection.data import CocoDataset, DetectionBatch, TrainingBatches
from poa.tasks.detection.metrics import CocoMetric
from poa.tasks.detection.model import Detector, build_detector
from poa.tasks.detection.pictures import detection_picture, detections_on, shown_images
from poa.tasks.detection.task import (
    DetectionData,
    DetectionReport,
    DetectionTask,
    check_detection,
    train_detection,
)

__all__ = [
    "AnnotationCounts",
    "Annotations",
    "CascadeRoIHeads",
    "CocoDataset",
    "CocoMetric",
    "DetectionBatch",
    "DetectionData",
    "DetectionReport",
    "DetectionTask",
    "Detector",
    "Instance",
    "Target",
    "TrainingBatches",
    "build_detector",
    "check_detection",
    "detection_picture",
    "detections_on",
    "read_annotations",
    "require_metric_libraries",
    "shown_images",
    "train_detection",
]
