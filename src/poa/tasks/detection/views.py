"""Boxes and masks of an image's objects as they stand on a canvas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from poa.tasks.dense.annotations import Instance
from poa.tasks.dense.canvas import View
from poa.tasks.dense.extras import mask_api


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
