"""Greys of more than 8 bits as 8-bit images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

_MAX_16_BIT = 65535
_STEP_16_BIT = 257


def to_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or as mode "L" where it is a grey with more than 8 bits.

    16-bit values are divided by 257 (so 65535 becomes 255). 32-bit integers within 0-255 stay, within
    0-65535 are taken for 16-bit values, others are stretched from their least to their greatest.
    Floating-point values within 0-1 are multiplied by 255, others are stretched likewise; values that are
    not finite count as the least finite one.

    Args:
        image: any PIL image.

    Raises:
        ValueError: a floating-point image without a finite value.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        return _grey(values / _STEP_16_BIT)
    if image.mode == "I":
        return _grey(_from_integers(np.asarray(image).astype(np.float64)))
    if image.mode == "F":
        return _grey(_from_floats(np.asarray(image).astype(np.float64)))
    return image


def _from_integers(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    low, high = values.min(), values.max()
    if low < 0 or high > _MAX_16_BIT:
        return _stretched(values)
    return values / _STEP_16_BIT if high > 255 else values


def _from_floats(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no value is a finite number")
    values = np.where(finite, values, values[finite].min())
    within_unit = values.min() >= 0.0 and values.max() <= 1.0
    return values * 255.0 if within_unit else _stretched(values)


def _stretched(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    low, high = values.min(), values.max()
    return (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)


def _grey(values: Float[np.ndarray, "h w"]) -> Image.Image:
    pixels: UInt8[np.ndarray, "h w"] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)
