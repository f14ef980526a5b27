"""Configuration of semantic segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poa.config.checks import require, require_non_negative, require_positive, require_probability, require_range
from poa.config.fit import FitConfig

SegmentHead = Literal["linear", "upernet"]
"""linear: batch norm and a 1×1 convolution on the frozen network (DINOv2); upernet: UPerNet (Xiao et al., 2018)."""

SEGMENT_FIT = FitConfig(epochs=40, batch_size=16, lr=1e-3, warmup_epochs=2.0, evaluate_every=40)
"""How heads are trained by default; only the last epoch is evaluated."""


@dataclass(frozen=True)
class SegmentConfig:
    """How images and masks reach the network, what is trained on top of it, and what data are accepted.

    On a CPU keep `image_size` small (96 128), and with UPerNet `channels` too (64).
    """

    image_size: tuple[int, int] | None = None
    """Height and width that images are letterboxed to; by default both are twice the side of the network's images."""
    num_maps: int = 4
    """Linear head: how many of the last blocks' maps it sees (stages' maps, where a network has stages)."""
    channels: int = 256
    """UPerNet: channels of its decoder."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the network's last block, where the network is trained too."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale while training; 1 fits the image into `image_size`."""
    flip_prob: float = 0.5
    """Chance of a horizontal flip while training."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation while training; 0: none."""
    background: Literal["class", "ignore"] = "class"
    """COCO files: what pixels without an object are: a class of their own, or left out."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of images, or of COCO objects, cannot be used; else they are left out."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused unread."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            sides = "two numbers of pixels, height and width, of 16 or more"
            is_size = len(self.image_size) == 2 and min(self.image_size) >= 16
            require(is_size, "segment.image_size", self.image_size, sides)
        for name in ("num_maps", "channels"):
            require(getattr(self, name) >= 1, f"segment.{name}", getattr(self, name), "1 or more")
        for name in ("drop_path", "flip_prob", "max_bad_share"):
            require_probability(f"segment.{name}", getattr(self, name))
        require_range("segment.scale_range", self.scale_range, 0.05, 20.0)
        require_non_negative("segment.color_jitter", self.color_jitter)
        require_positive("segment.max_pixels", self.max_pixels)
        choices = ("class", "ignore")
        require(self.background in choices, "segment.background", self.background, " or ".join(choices))
