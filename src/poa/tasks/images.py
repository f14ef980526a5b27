"""Labelled images as batches to train on and to measure on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poa.config import AugmentConfig, FinetuneConfig
from poa.data import (
    BadImage,
    LabelledImages,
    SkippedImage,
    ViewRecipe,
    apply_view,
    draw_view,
    eval_transform,
    first_readable,
    make_loader,
)
from poa.data.sources import check_bad_share
from poa.errors import ConfigError
from poa.family import Preprocessing
from poa.randomness import derived_seed, generator


class LabelBatch(NamedTuple):
    """Images with their classes.

    Attributes:
        images: not normalised yet.
        targets: the class of each, or for each class whether the image is of it.
        number: which batch of the run it is.
        skipped: images that could not be read; in training each was replaced by the next one that could.
    """

    images: UInt8[Tensor, "B C S S"]
    targets: Shaped[Tensor, "B *K"]
    number: int
    skipped: list[SkippedImage]


class TrainingImages(Dataset[LabelBatch]):
    """Batch t of a run, as item t: a pure function of the images, the numbers and the seed.

    Each epoch is a permutation of the images. Those that do not fill its last batch are left out in that epoch; fewer
    images than a batch are one batch.

    Args:
        images: what is trained on.
        config: crops, flips, colour, RandAugment.
        how: size and number of channels.
        batch_size: images of a batch.
        seed: of the run.

    Raises:
        ConfigError: RandAugment is asked for on images with alpha.
    """

    def __init__(
        self, images: LabelledImages, config: FinetuneConfig, how: Preprocessing, batch_size: int, seed: int
    ) -> None:
        if config.randaugment_ops and how.num_channels not in (1, 3):
            raise ConfigError(
                f"RandAugment is for images of 1 or 3 channels, the network takes {how.num_channels}. "
                "Give --randaugment-ops 0."
            )
        self.images, self.config, self.how = images, config, how
        self.batch_size, self.seed = min(batch_size, len(images)), seed
        strength = config.color_jitter
        augment = AugmentConfig(
            aspect=config.aspect,
            flip_prob=config.flip_prob,
            jitter_prob=float(strength > 0),
            brightness=strength,
            contrast=strength,
            saturation=strength,
            hue=0.0,
            grayscale_prob=0.0,
        )
        self.recipe = ViewRecipe(augment, how.image_size, config.crop_scale, blur_prob=0.0, solarize_prob=0.0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.images) // self.batch_size

    def __getitem__(self, number: int) -> LabelBatch:
        """The batch; the epochs follow one another."""
        epoch, step = divmod(number, len(self))
        order = _order(len(self.images), self.seed, epoch)
        skipped: list[SkippedImage] = []
        views, places = [], []
        for place in order[step * self.batch_size : (step + 1) * self.batch_size].tolist():
            image, found = first_readable(self.images.source, self.images.indices, place, skipped)
            views.append(self._view(image, epoch, place))
            places.append(found)
        return LabelBatch(torch.stack(views), torch.from_numpy(self.images.targets[places]), number, skipped)

    def _view(self, image: Image.Image, epoch: int, place: int) -> UInt8[Tensor, "C S S"]:
        rng = generator(self.seed, "finetune view", epoch, place)
        view = torch.from_numpy(np.array(apply_view(image, draw_view(image, self.recipe, rng))))
        if not self.config.randaugment_ops:
            return view
        from torchvision.transforms.v2 import RandAugment

        augment = RandAugment(self.config.randaugment_ops, self.config.randaugment_magnitude)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(self.seed, "randaugment", epoch, place))
            found: Tensor = augment(view)
        return found


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " images"]:
    return generator(seed, "finetune order", epoch).permutation(num_images)


class MeasuredImages(Dataset[LabelBatch]):
    """The images in order, in batches, as they are evaluated."""

    def __init__(self, images: LabelledImages, how: Preprocessing, batch_size: int) -> None:
        self.images, self.how, self.batch_size = images, how, batch_size

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, number: int) -> LabelBatch:
        """The batch without those of its images that cannot be read; none may be left."""
        how, source = self.how, self.images.source
        shape = (0, how.num_channels, how.image_size, how.image_size)
        skipped, views, places = [], [np.zeros(shape, dtype=np.uint8)], []
        for place in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))):
            index = int(self.images.indices[place])
            try:
                image = source.load(index)
            except BadImage as error:
                skipped.append(SkippedImage(source.image_name(index), error.reason))
                continue
            views.append(eval_transform(image, how.image_size, how.crop_pct, how.interpolation)[None])
            places.append(place)
        targets = torch.from_numpy(self.images.targets[places])
        return LabelBatch(torch.from_numpy(np.concatenate(views)), targets, number, skipped)


class SkippedImages:
    """The images of one source that could not be read, each once.

    Args:
        images: those that may be read.
        max_share: the greatest share of unusable ones that is accepted.
    """

    def __init__(self, images: LabelledImages, max_share: float) -> None:
        self.num_images, self.max_share = len(images), max_share
        self.found: dict[str, SkippedImage] = {}

    def add(self, skipped: list[SkippedImage]) -> None:
        """Takes them in.

        Raises:
            DataError: they are too many.
        """
        if skipped:
            self.found.update((bad.name, bad) for bad in skipped)
            check_bad_share(tuple(self.found.values()), self.num_images, self.max_share)


def loaded(
    batches: TrainingImages | MeasuredImages, first: int, last: int, num_workers: int, skipped: SkippedImages
) -> Iterator[LabelBatch]:
    """Batches first … last − 1 that have images, the same ones for any number of workers."""
    for batch in make_loader(batches, first, last, num_workers, pin_memory=torch.cuda.is_available()):
        skipped.add(batch.skipped)
        if len(batch.images):
            yield batch
