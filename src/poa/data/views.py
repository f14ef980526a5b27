"""One augmented view of an image: what is drawn, kept apart from what is done."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from poa.config import AugmentConfig
from poa.data.decode import pixel_limit

_MAX_TRIES = 10
_COLOUR_OPS = ("brightness", "contrast", "saturation", "hue")
_NUM_COLOUR_OPS = {"L": 2, "RGB": 4, "RGBA": 4}
_LARGE = 50_000_000
_LEVELS = np.arange(256.0)
_ROUND_DOWN = -0.499


@dataclass(frozen=True)
class ViewRecipe:
    """What views of one kind (first global, second global, local) are drawn from.

    Attributes:
        config: everything that the kinds have in common.
        size: side of the view in pixels.
        scale: least and greatest share of the image's area.
        blur_prob: chance of Gaussian blur.
        solarize_prob: chance of solarising.
    """

    config: AugmentConfig
    size: int
    scale: tuple[float, float]
    blur_prob: float
    solarize_prob: float


@dataclass(frozen=True, slots=True)
class ViewDraw:
    """All that `apply_view` needs beside the image.

    Attributes:
        box: left, top, right and bottom of the crop, whole pixels within the image.
        size: side of the view in pixels.
        flip: mirror it horizontally.
        jitter: (operation, amount) in the order of application; none when jitter is not applied. The amount
            is a factor for brightness, contrast and saturation and a share of the circle for hue.
        grayscale: drop the colour.
        blur_kernel: side of the blur's kernel, odd.
        blur_sigma: standard deviation of the blur in pixels, 0 for no blur.
        solarize: invert values from here on; 256 inverts none.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur_kernel: int = 1
    blur_sigma: float = 0.0
    solarize: int = 256


def draw_view(image: Image.Image, recipe: ViewRecipe, rng: np.random.Generator) -> ViewDraw:
    """The draws of one view, from DINO's recipe (Caron et al., 2021, appendix B).

    Always takes the same 36 numbers from `rng`, whatever the image and the probabilities are.

    Args:
        image: of mode "L", "RGB" or "RGBA"; only size and mode are looked at. In mode "L", saturation, hue
            and grayscale are left out.
        recipe: what to draw from.
        rng: every random number comes from here.
    """
    config = recipe.config
    draws = rng.random(2 * _MAX_TRIES + 16).tolist()
    crop, rest = draws[: 2 * _MAX_TRIES + 2], draws[2 * _MAX_TRIES + 2 :]
    flip, jitter, gray, blur, sigma, solarize = rest[:6]
    low, high = config.blur_sigma
    return ViewDraw(
        box=_draw_box(image.size, recipe.scale, config.aspect, crop),
        size=recipe.size,
        flip=flip < config.flip_prob,
        jitter=_draw_jitter(config, image.mode, rest[6:]) if jitter < config.jitter_prob else (),
        grayscale=image.mode != "L" and gray < config.grayscale_prob,
        blur_kernel=config.blur_kernel,
        blur_sigma=low + (high - low) * sigma if blur < recipe.blur_prob else 0.0,
        solarize=config.solarize_threshold if solarize < recipe.solarize_prob else 256,
    )


def apply_view(image: Image.Image, draw: ViewDraw) -> UInt8[np.ndarray, "channels size size"]:
    """The view: crop, resize (bicubic, antialiased), flip, jitter, grayscale, blur, solarise.

    Colour operations follow the formulas of torchvision's transforms of PIL images; rounding may differ by
    single levels. The alpha of an "RGBA" image is cropped, resized, flipped and blurred only.

    Args:
        image: of mode "L", "RGB" or "RGBA".
        draw: from `draw_view`, for an image of this size and mode.
    """
    with pixel_limit(image.width * image.height) if image.width * image.height > _LARGE else nullcontext():
        view = image.crop(draw.box)
    view = view.resize((draw.size, draw.size), Image.Resampling.BICUBIC)
    if draw.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = _recoloured(np.asarray(view), draw)
    if draw.blur_sigma > 0.0 and draw.blur_kernel > 1:
        side = (draw.blur_kernel, draw.blur_kernel)
        blurred = cv2.GaussianBlur(pixels, side, draw.blur_sigma, borderType=cv2.BORDER_REFLECT_101)
        pixels = np.asarray(blurred, dtype=np.uint8)
    channels = pixels.reshape(draw.size, draw.size, -1).transpose(2, 0, 1)
    return _solarized(channels, draw.solarize) if draw.solarize < 256 else channels


def _draw_box(
    size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box: uniform area, log-uniform aspect, 10 tries, else the largest central crop."""
    width, height = size
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for attempt in range(_MAX_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        ratio = math.exp(log_low + (log_high - log_low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[-2] * (width - w + 1)), int(draws[-1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < aspect[0]:
        h = min(height, max(1, round(width / aspect[0])))
    elif width / height > aspect[1]:
        w = min(width, max(1, round(height * aspect[1])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _draw_jitter(config: AugmentConfig, mode: str, draws: list[float]) -> tuple[tuple[str, float], ...]:
    """The operations of the mode in random order, each with its amount; those of strength 0 are left out."""
    amounts = []
    for place, operation in enumerate(_COLOUR_OPS[: _NUM_COLOUR_OPS[mode]]):
        strength: float = getattr(config, operation)
        centre = 0.0 if operation == "hue" else 1.0
        if strength > 0.0:
            amount = centre + strength * (2.0 * draws[place] - 1.0)
            amounts.append((draws[4 + place], operation, amount))
    return tuple((operation, amount) for _, operation, amount in sorted(amounts))


def _recoloured(pixels: UInt8[np.ndarray, "h w *channels"], draw: ViewDraw) -> UInt8[np.ndarray, "h w *channels"]:
    if not (draw.jitter or draw.grayscale):
        return pixels
    has_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    colours = np.ascontiguousarray(pixels[..., :3]) if has_alpha else pixels
    for operation, amount in draw.jitter:
        colours = _jittered(colours, operation, amount)
    if draw.grayscale:
        colours = _without_colour(colours)
    return np.dstack((colours, pixels[..., 3])) if has_alpha else colours


def _jittered(
    pixels: UInt8[np.ndarray, "h w *channels"], operation: str, amount: float
) -> UInt8[np.ndarray, "h w *channels"]:
    if operation == "hue":
        hsv = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL), dtype=np.uint8)
        hsv[..., 0] += np.uint8(round(amount * 256) % 256)
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)
    if operation == "saturation":
        blend = cv2.addWeighted(pixels, amount, _without_colour(pixels), 1.0 - amount, _ROUND_DOWN)
        return np.asarray(blend, dtype=np.uint8)
    anchor = 0 if operation == "brightness" else int(cv2.mean(_luma(pixels))[0] + 0.5)
    table = np.clip(anchor + amount * (_LEVELS - anchor), 0.0, 255.0).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels, table), dtype=np.uint8)


def _luma(pixels: UInt8[np.ndarray, "h w *channels"]) -> UInt8[np.ndarray, "h w"]:
    if pixels.ndim == 2:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _without_colour(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(cv2.cvtColor(_luma(pixels), cv2.COLOR_GRAY2RGB), dtype=np.uint8)


def _solarized(channels: UInt8[np.ndarray, "channels h w"], threshold: int) -> UInt8[np.ndarray, "channels h w"]:
    inverted = np.where(channels >= threshold, 255 - channels, channels)
    if len(channels) == 4:
        inverted[3] = channels[3]
    return inverted
