"""How an image and its objects are put on a canvas of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from poa.config import DetectConfig
from poa.tasks.detection.annotations import Instance
from poa.tasks.detection.extras import mask_api


class View(NamedTuple):
    """Where an image stands on the canvas.

    Attributes:
        size: height and width that it is resized to.
        offset: row and column of its upper left corner; negative where it reaches out of the canvas.
        flip: whether left and right change places.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    flip: bool


def fitted(size: tuple[int, int], limits: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """(Height, width) of an image resized with its aspect kept so that it just fits, times a scale."""
    factor = scale * min(limits[0] / size[0], limits[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def as_tensor(image: Image.Image) -> UInt8[Tensor, "C h w"]:
    """The pixels, channels first."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1).copy())


def draw_view(size: tuple[int, int], config: DetectConfig, rng: np.random.Generator) -> View:
    """A random scale, place and flip for an image of that size (large-scale jitter; Ghiasi et al., 2021)."""
    resized = fitted(size, config.image_size, rng.uniform(*config.scale_range))
    room = [limit - side for limit, side in zip(config.image_size, resized, strict=True)]
    row, column = (int(rng.integers(min(0, free), max(0, free), endpoint=True)) for free in room)
    return View(resized, (row, column), bool(rng.random() < config.flip_prob))


def on_canvas(image: Image.Image, view: View, canvas: tuple[int, int], fill: int | tuple[int, ...]) -> Image.Image:
    """The image there, on a canvas of that height and width and that colour."""
    resized = image.resize(view.size[::-1], Image.Resampling.BILINEAR)
    if view.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = Image.new(image.mode, canvas[::-1], fill)
    found.paste(resized, view.offset[::-1])
    return found


def moved_boxes(
    boxes: Float[np.ndarray, "N 4"], view: View, size: tuple[int, int], canvas: tuple[int, int]
) -> Float[np.ndarray, "N 4"]:
    """Boxes of an image of that height and width as they stand on the canvas, cut at its border."""
    scale = view.size[1] / size[1], view.size[0] / size[0]
    moved: np.ndarray = boxes * np.array(scale * 2)
    if view.flip:
        moved[:, [0, 2]] = view.size[1] - moved[:, [2, 0]]
    moved += np.array(view.offset[::-1] * 2)
    np.clip(moved, 0.0, np.array(canvas[::-1] * 2, dtype=float), out=moved)
    return moved


def moved_masks(masks: UInt8[np.ndarray, "N h w"], view: View, canvas: tuple[int, int]) -> UInt8[np.ndarray, "N H W"]:
    """Masks of an image as they stand on the canvas."""
    found = np.zeros((len(masks), *canvas), dtype=np.uint8)
    for mask, row in zip(masks, found, strict=True):
        resized = Image.fromarray(mask).resize(view.size[::-1], Image.Resampling.NEAREST)
        place = Image.new("L", canvas[::-1])
        place.paste(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else resized, view.offset[::-1])
        row[:] = np.asarray(place)
    return found


def decoded_masks(instances: Sequence[Instance], size: tuple[int, int]) -> UInt8[np.ndarray, "N h w"]:
    """Zeros and ones for every object."""
    found = np.zeros((len(instances), *size), dtype=np.uint8)
    for item, mask in zip(instances, found, strict=True):
        mask[:] = mask_api().decode(item.mask)
    return found
