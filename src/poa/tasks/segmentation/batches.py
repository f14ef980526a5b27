"""Images and masks as batches to train on and to measure on."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poa.config.segment import SegmentConfig
from poa.family import Preprocessing
from poa.randomness import derived_seed, generator
from poa.tasks.dense.canvas import View, as_tensor, draw_view, fitted, on_canvas
from poa.tasks.segmentation.data import IGNORED, DenseImages


class MaskedBatch(NamedTuple):
    """Images on canvases of one size, not normalised yet, with their masks on the same."""

    images: UInt8[Tensor, "B C H W"]
    masks: UInt8[Tensor, "B H W"]


class MeasuredBatch(NamedTuple):
    """Letterboxed images, where each stands on its canvas, and the masks as they are."""

    images: UInt8[Tensor, "B C H W"]
    views: list[View]
    masks: list[Tensor]


class TrainingCrops(Dataset[MaskedBatch]):
    """Batch t of a run, as item t: a pure function of the data, the numbers and the seed.

    Each epoch is a permutation of the images. Those that do not fill its last batch are left out in that epoch; fewer
    images than a batch are one batch. A random scale, place, flip and colour for each image; the first three are its
    mask's too.

    Args:
        data: what is trained on.
        config: scales, flips, colour.
        canvas: height and width of what the network sees.
        how: of the mean colour, which fills the canvas.
        batch_size: images of a batch.
        seed: of the run.
    """

    def __init__(
        self,
        data: DenseImages,
        config: SegmentConfig,
        canvas: tuple[int, int],
        how: Preprocessing,
        batch_size: int,
        seed: int,
    ) -> None:
        self.data, self.canvas, self.seed = data, canvas, seed
        self.fill, self.color_jitter = fill_of(how), config.color_jitter
        self.batch_size = min(batch_size, len(data))
        self.jitter = config.scale_range, config.flip_prob

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.data) // self.batch_size

    def __getitem__(self, number: int) -> MaskedBatch:
        """The batch; the epochs follow one another."""
        epoch, step = divmod(number, len(self))
        order = generator(self.seed, "segment order", epoch).permutation(len(self.data))
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
        images, masks = zip(*(self._sample(epoch, index) for index in chosen), strict=True)
        return MaskedBatch(torch.stack(images), torch.stack(masks))

    def _sample(self, epoch: int, index: int) -> tuple[UInt8[Tensor, "C H W"], UInt8[Tensor, "H W"]]:
        image, mask = self.data.load(index)
        rng = generator(self.seed, "segment view", epoch, index)
        view = draw_view((image.height, image.width), self.canvas, *self.jitter, rng)
        pixels = as_tensor(on_canvas(image, view, self.canvas, self.fill))
        placed = mask_on_canvas(mask, view, self.canvas)
        return self._coloured(pixels, derived_seed(self.seed, "segment colour", epoch, index)), placed

    def _coloured(self, pixels: UInt8[Tensor, "C H W"], seed: int) -> UInt8[Tensor, "C H W"]:
        """Random brightness, contrast and saturation; an alpha channel stays as it is."""
        if not self.color_jitter:
            return pixels
        from torchvision.transforms.v2 import ColorJitter

        strength = self.color_jitter
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            coloured: Tensor = ColorJitter(strength, strength, strength)(pixels[:3])
        return torch.cat([coloured, pixels[3:]])


class MeasuredMasks(Dataset[MeasuredBatch]):
    """The images in order, in batches, each centred on its canvas at the largest size that fits."""

    def __init__(self, data: DenseImages, canvas: tuple[int, int], how: Preprocessing, batch_size: int) -> None:
        self.data, self.canvas, self.batch_size = data, canvas, batch_size
        self.fill = fill_of(how)

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(len(self.data) / self.batch_size)

    def __getitem__(self, number: int) -> MeasuredBatch:
        """The batch."""
        images, views, masks = [], [], []
        for index in range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.data))):
            image, mask = self.data.load(index)
            views.append(letterbox((image.height, image.width), self.canvas))
            images.append(as_tensor(on_canvas(image, views[-1], self.canvas, self.fill)))
            masks.append(torch.from_numpy(mask))
        return MeasuredBatch(torch.stack(images), views, masks)


def letterbox(size: tuple[int, int], canvas: tuple[int, int]) -> View:
    """An image of that height and width as large as it fits on the canvas, in its middle."""
    resized = fitted(size, canvas)
    row, column = ((limit - side) // 2 for limit, side in zip(canvas, resized, strict=True))
    return View(resized, (row, column), flip=False)


def mask_on_canvas(mask: UInt8[np.ndarray, "h w"], view: View, canvas: tuple[int, int]) -> UInt8[Tensor, "H W"]:
    """The mask where the image is, the nearest pixel's class each; what is not the image is left out."""
    resized = Image.fromarray(mask).resize(view.size[::-1], Image.Resampling.NEAREST)
    placed = Image.new("L", canvas[::-1], IGNORED)
    placed.paste(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else resized, view.offset[::-1])
    return torch.from_numpy(np.array(placed))


def fill_of(how: Preprocessing) -> int | tuple[int, ...]:
    """The mean colour, 0-255."""
    colour = tuple(round(255 * value) for value in how.per_channel(how.mean))
    return colour if len(colour) > 1 else colour[0]
