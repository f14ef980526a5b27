"""Configuration of the multi-crop augmentation and of the block masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from poa.config.checks import (
    MAX_SIDE,
    require,
    require_bounded,
    require_non_negative,
    require_positive,
    require_probability,
    require_range,
)


@dataclass(frozen=True)
class AugmentConfig:
    """Multi-crop augmentation: two global views and some local crops of every image.

    The defaults are DINO's published ones. The blur probabilities differ on purpose from what the POA
    reference effectively applies (0, 0.9, 0.5), see docs/decisions.md.
    """

    num_local_crops: int = 8
    """Local crops per image, beside the two global ones; 0 is allowed."""
    local_size: int = 96
    """Side of the local crops in pixels; the global crops have the model's image size."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop before resizing."""
    flip_prob: float = 0.5
    """Chance of a horizontal flip."""
    jitter_prob: float = 0.8
    """Chance of colour jitter."""
    brightness: float = 0.4
    """Strength of the brightness jitter: factor in 1 ± this."""
    contrast: float = 0.4
    """Strength of the contrast jitter."""
    saturation: float = 0.2
    """Strength of the saturation jitter (colour images only)."""
    hue: float = 0.1
    """Strength of the hue jitter, at most 0.5 (colour images only)."""
    grayscale_prob: float = 0.2
    """Chance of dropping the colour (colour images only)."""
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Chance of Gaussian blur for the first global, the second global and the local crops."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels."""
    blur_kernel: int = 9
    """Side of the blur's kernel in pixels, odd."""
    solarize_prob: float = 0.2
    """Chance of solarising the second global view."""
    solarize_threshold: int = 128
    """Values from here on are inverted when solarising (0-255)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel (values 0-1), subtracted; one number serves all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, divided by; one number serves all channels."""

    def __post_init__(self) -> None:
        require_bounded(self, {"num_local_crops": 1_000, "local_size": MAX_SIDE, "blur_kernel": MAX_SIDE}, "augment")
        require_non_negative("augment.num_local_crops", self.num_local_crops)
        require_positive("augment.local_size", self.local_size)
        for name in ("global_scale", "local_scale"):
            require_range(f"augment.{name}", getattr(self, name), 1e-4, 1.0)
        require_range("augment.aspect", self.aspect, 0.05, 20.0)
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "solarize_prob"):
            require_probability(f"augment.{name}", getattr(self, name))
        require(len(self.blur_probs) == 3, "augment.blur_probs", self.blur_probs, "three: view 1, view 2, local")
        for value in self.blur_probs:
            require_probability("augment.blur_probs", value)
        for name in ("brightness", "contrast", "saturation"):
            require_probability(f"augment.{name}", getattr(self, name))
        require(0.0 <= self.hue <= 0.5, "augment.hue", self.hue, "between 0 and 0.5")
        require_range("augment.blur_sigma", self.blur_sigma, 1e-3, 100.0)
        kernel = self.blur_kernel
        require(kernel > 0 and kernel % 2 == 1, "augment.blur_kernel", kernel, "odd and positive")
        require(
            0 <= self.solarize_threshold <= 256,
            "augment.solarize_threshold",
            self.solarize_threshold,
            "0 to 256",
        )
        require(len(self.mean) == len(self.std), "augment.std", self.std, "as long as augment.mean")
        require(all(map(math.isfinite, self.mean)), "augment.mean", self.mean, "finite")
        good = all(value > 0 and math.isfinite(value) for value in self.std)
        require(good, "augment.std", self.std, "finite numbers greater than 0")


@dataclass(frozen=True)
class MaskConfig:
    """Block-wise masks on the patches of the global views (BEiT, iBOT)."""

    prob: float = 0.5
    """Share of the global views of a batch that are masked."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Share of a masked view's patches; the views of a batch are spread evenly over this range."""
    min_aspect: float = 0.3
    """Blocks have a height over width between this and its inverse."""
    min_patches: int = 4
    """Smallest block, in patches."""

    def __post_init__(self) -> None:
        require_probability("mask.prob", self.prob)
        require_range("mask.ratio", self.ratio, 0.0, 1.0)
        require(0.0 < self.min_aspect <= 1.0, "mask.min_aspect", self.min_aspect, "between 0 (excluded) and 1")
        require(self.min_patches >= 1, "mask.min_patches", self.min_patches, "1 or more")
