"""Multi-crop augmentation, normalisation, and the transform of evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from poa.config import AugmentConfig
from poa.data.decode import mode_of_channels
from poa.data.views import ViewRecipe, apply_view, draw_view

NUM_GLOBAL_CROPS = 2
_MAX_ASPECT = 16


class MultiCrop:
    """Two global crops and some local ones of an image (Caron et al., SwAV, 2020; DINO, 2021).

    Args:
        config: the augmentation.
        global_size: side of the global crops in pixels.
        num_channels: 1, 3 or 4, as the images have.

    Raises:
        ConfigError: another number of channels.
    """

    def __init__(self, config: AugmentConfig, global_size: int, num_channels: int) -> None:
        mode_of_channels(num_channels)
        self.num_channels = num_channels
        first, second, local = config.blur_probs
        self._globals = (
            ViewRecipe(config, global_size, config.global_scale, first, 0.0),
            ViewRecipe(config, global_size, config.global_scale, second, config.solarize_prob),
        )
        local_recipe = ViewRecipe(config, config.local_size, config.local_scale, local, 0.0)
        self._locals = (local_recipe,) * config.num_local_crops
        self._shapes = (
            (NUM_GLOBAL_CROPS, num_channels, global_size, global_size),
            (config.num_local_crops, num_channels, config.local_size, config.local_size),
        )

    def __call__(
        self, image: Image.Image, draw: Callable[[int], np.random.Generator]
    ) -> tuple[UInt8[np.ndarray, "2 C G G"], UInt8[np.ndarray, "L C S S"]]:
        """The global and the local crops.

        Args:
            image: of the mode that belongs to the number of channels ("L", "RGB", "RGBA").
            draw: gives the generator of crop k: 0 and 1 are the global crops, 2 and on the local ones.
        """
        crops = np.empty(self._shapes[0], dtype=np.uint8), np.empty(self._shapes[1], dtype=np.uint8)
        for k, recipe in enumerate(self._globals):
            crops[0][k] = apply_view(image, draw_view(image, recipe, draw(k)))
        for k, recipe in enumerate(self._locals):
            view = draw_view(image, recipe, draw(NUM_GLOBAL_CROPS + k))
            crops[1][k] = apply_view(image, view)
        return crops


def normalize(
    crops: UInt8[Tensor, "*batch c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*batch c h w"]:
    """The crops divided by 255, less the mean, over the standard deviation, in float32 on their device.

    Args:
        crops: 8-bit images.
        mean: of every channel, values 0-1; one number serves all channels.
        std: likewise.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=crops.device)[:, None, None]
    scale = torch.tensor(std, dtype=torch.float32, device=crops.device)[:, None, None]
    return crops.to(torch.float32).div_(255.0).sub_(shift).div_(scale)


def eval_transform(
    image: Image.Image, size: int, crop_pct: float = 1.0, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "channels size size"]:
    """The shorter side resized to ⌊size / crop_pct⌋, then the central square, as timm evaluates.

    Of images more than 16 times as long as wide, only what the square shows is resized, so that memory does
    not grow with the aspect; this equals timm's result up to rounding.

    Args:
        image: of mode "L", "RGB" or "RGBA".
        size: side of the square in pixels.
        crop_pct: share of the shorter side that the square covers, more than 0 and at most 1.
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
    """
    resample = Image.Resampling[interpolation.upper()]
    width, height = image.size
    short, shorter = math.floor(size / crop_pct), min(width, height)
    resized = (int(short * width / shorter), int(short * height / shorter))
    left, top = (round((side - size) / 2.0) for side in resized)
    corners = (left, top, left + size, top + size)
    if max(resized) <= _MAX_ASPECT * short:
        square = image.resize(resized, resample).crop(corners)
    else:
        box = _scaled_box(corners, (width / resized[0], height / resized[1]), image.size)
        square = image.resize((size, size), resample, box=box)
    return np.ascontiguousarray(np.asarray(square).reshape(size, size, -1).transpose(2, 0, 1))


def _scaled_box(
    corners: tuple[int, int, int, int], scale: tuple[float, float], limits: tuple[int, int]
) -> tuple[float, float, float, float]:
    left, top, right, bottom = corners
    return (
        left * scale[0],
        top * scale[1],
        min(right * scale[0], limits[0]),
        min(bottom * scale[1], limits[1]),
    )
