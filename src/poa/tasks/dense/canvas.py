"""How an image is put on a canvas of one size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


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


def draw_view(
    size: tuple[int, int],
    canvas: tuple[int, int],
    scale_range: tuple[float, float],
    flip_prob: float,
    rng: np.random.Generator,
) -> View:
    """A random scale, place and flip for an image of that size (large-scale jitter; Ghiasi et al., 2021)."""
    resized = fitted(size, canvas, rng.uniform(*scale_range))
    room = [limit - side for limit, side in zip(canvas, resized, strict=True)]
    row, column = (int(rng.integers(min(0, free), max(0, free), endpoint=True)) for free in room)
    return View(resized, (row, column), bool(rng.random() < flip_prob))


def on_canvas(image: Image.Image, view: View, canvas: tuple[int, int], fill: int | tuple[int, ...]) -> Image.Image:
    """The image there, on a canvas of that height and width and that colour."""
    resized = image.resize(view.size[::-1], Image.Resampling.BILINEAR)
    if view.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = Image.new(image.mode, canvas[::-1], fill)
    found.paste(resized, view.offset[::-1])
    return found
