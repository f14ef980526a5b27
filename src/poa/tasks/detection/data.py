"""Annotated images as batches to train on, and as images to measure on."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poa.config import DetectConfig
from poa.data import BadImage, decode_image
from poa.data.base import printable
from poa.errors import DataError
from poa.randomness import generator
from poa.tasks.dense.annotations import Accepting, AnnotationCounts, Instance, read_annotations
from poa.tasks.dense.canvas import View, as_tensor, draw_view, on_canvas
from poa.tasks.detection.cascade import Target
from poa.tasks.detection.views import decoded_masks, moved_boxes, moved_masks

_SMALLEST = 1.0


class CocoDataset:
    """The images of a folder with their objects, from an annotation file in COCO's format.

    Everything is checked when it is opened, see `read_annotations`.

    Attributes:
        name: of the annotation file.
        class_names: in the order of the categories' ids.
        counts: what the file holds and what of it cannot be used.
        fingerprint: changes when the annotations do.

    Args:
        annotations: the JSON file.
        images: what its `file_name`s are relative to.
        config: masks, the greatest size of an image and share of unusable ones.
        num_channels: 1, 3 or 4, as the network takes.

    Raises:
        DataError: see `read_annotations`.
    """

    def __init__(self, annotations: Path, images: Path, config: DetectConfig, num_channels: int = 3) -> None:
        self.name = str(annotations)
        self.folder = images
        self.num_channels = num_channels
        self.max_pixels = config.max_pixels
        self.has_masks = config.masks
        accepting = Accepting(config.masks, config.max_bad_share, config.max_pixels, "--detect.max-bad-share")
        found = read_annotations(annotations, images, accepting, num_channels)
        self._images = found.images
        self.class_names: tuple[str, ...] = found.class_names
        self.counts: AnnotationCounts = found.counts
        self.fingerprint: str = hashlib.sha256(annotations.read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        """The image, decoded.

        Raises:
            DataError: it can no longer be read.
        """
        try:
            return decode_image(self.folder / self._images[index].file_name, self.num_channels, self.max_pixels)
        except BadImage as error:
            raise DataError(
                f"{self.image_name(index)} {error.reason}; it could be read when the data were checked. "
                "Is the disk still there?"
            ) from error

    def image_name(self, index: int) -> str:
        """For messages."""
        return printable(self._images[index].file_name)

    def instances(self, index: int) -> list[Instance]:
        """The objects on the image, crowds among them."""
        return self._images[index].instances

    def num_objects(self) -> dict[str, int]:
        """Objects of each class, crowds not counted."""
        found = Counter(item.label for image in self._images for item in image.instances if not item.is_crowd)
        return {name: found[label] for label, name in enumerate(self.class_names)}

    def truth(self, index: int) -> Target:
        """What COCO's metric is given: `boxes`, `labels` from 0, `iscrowd`, `area` and with masks `masks`."""
        found = self.instances(index)
        target = {
            "boxes": torch.tensor([item.box for item in found], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([item.label for item in found], dtype=torch.int64),
            "iscrowd": torch.tensor([item.is_crowd for item in found], dtype=torch.int64),
            "area": torch.tensor([item.area for item in found], dtype=torch.float32),
        }
        if self.has_masks:
            height, width = self._images[index].size or (0, 0)
            target["masks"] = torch.from_numpy(decoded_masks(found, (height, width))).bool()
        return target


class DetectionBatch(NamedTuple):
    """Letterboxed images with what is to be found on them.

    Attributes:
        images: of one size.
        targets: for each image `boxes` [N, 4], `labels` [N] from 1 (0 is the background), with masks `masks` [N, H, W].
    """

    images: UInt8[Tensor, "B C H W"]
    targets: list[Target]


class TrainingBatches(Dataset[DetectionBatch]):
    """Batch t of a run, as item t: a pure function of the data, the numbers and the seed.

    Each epoch is a permutation of the images; its last batch may be smaller.

    Args:
        dataset: what is trained on.
        config: size of the canvas, flips and scales.
        fill: the colour around the images, 0-255.
        batch_size: images of a batch.
        seed: of the run.
    """

    def __init__(
        self, dataset: CocoDataset, config: DetectConfig, fill: Sequence[int], batch_size: int, seed: int
    ) -> None:
        self.dataset, self.config = dataset, config
        self.fill = tuple(fill) if len(fill) > 1 else fill[0]
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.dataset) / self.batch_size)

    def __getitem__(self, number: int) -> DetectionBatch:
        """The batch; the epochs follow one another."""
        epoch, step = divmod(number, len(self))
        order = generator(self.seed, "detection order", epoch).permutation(len(self.dataset))
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
        images, targets = zip(*(self._sample(epoch, index) for index in chosen), strict=True)
        return DetectionBatch(torch.stack(images), list(targets))

    def _sample(self, epoch: int, index: int) -> tuple[UInt8[Tensor, "C H W"], Target]:
        image = self.dataset.load(index)
        rng = generator(self.seed, "detection view", epoch, index)
        config = self.config
        size = (image.height, image.width)
        view = draw_view(size, config.image_size, config.scale_range, config.flip_prob, rng)
        objects = [item for item in self.dataset.instances(index) if not item.is_crowd]
        canvas = on_canvas(image, view, self.config.image_size, self.fill)
        return as_tensor(canvas), self._target(objects, view, (image.height, image.width))

    def _target(self, objects: list[Instance], view: View, size: tuple[int, int]) -> Target:
        boxes = moved_boxes(np.array([item.box for item in objects]).reshape(-1, 4), view, size, self.config.image_size)
        seen = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= _SMALLEST
        masks = None
        if self.config.masks:
            masks = moved_masks(decoded_masks(objects, size), view, self.config.image_size)
            seen &= masks.any(axis=(1, 2))
        target = {
            "boxes": torch.from_numpy(boxes[seen]).float(),
            "labels": torch.tensor([item.label + 1 for item in objects], dtype=torch.int64)[torch.from_numpy(seen)],
        }
        return target if masks is None else {**target, "masks": torch.from_numpy(masks[seen])}


class MeasuredImages(Dataset[Tensor]):
    """The images as they are, of any size."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> UInt8[Tensor, "C h w"]:
        """Values 0 to 255."""
        return as_tensor(self.dataset.load(index))
