"""Configuration of object detection and instance segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poa.config.checks import require, require_positive, require_probability, require_range
from poa.config.fit import FitConfig

DETECT_FIT = FitConfig(epochs=36, batch_size=16, lr=1e-4, warmup_epochs=0.5, layer_decay=0.8, evaluate_every=36)
"""How detectors are trained by default: as long and as fast as Swin's on COCO (Liu et al., 2021), with a cosine; only
the last epoch is evaluated."""


@dataclass(frozen=True)
class DetectConfig:
    """The detector on top of the network, how images reach it, and what annotations are accepted.

    The defaults are those of Faster R-CNN with a feature pyramid on COCO. For small images, small anchors, few
    proposals and narrow heads are as good and many times faster.
    """

    method: Literal["faster-rcnn", "cascade-rcnn"] = "faster-rcnn"
    """Faster R-CNN (Ren et al., 2015), or Cascade R-CNN (Cai & Vasconcelos, 2018): three heads, rising IoU."""
    masks: bool = False
    """Segment every instance too (Mask R-CNN; He et al., 2017); the annotations need segmentations."""
    image_size: tuple[int, int] = (512, 512)
    """Height and width that every image is letterboxed to: resized with its aspect kept, the rest filled."""
    channels: int = 256
    """Channels of the feature pyramid."""
    head_channels: int = 1024
    """Width of the two hidden layers that classify a region."""
    mask_channels: int = 256
    """Channels of the four convolutions that segment a region."""
    anchor_scale: float = 8.0
    """Side of a level's anchors over the level's stride; 8 makes 32 to 512 pixels of strides 4 to 64."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    num_proposals: int = 1000
    """Regions that the first stage proposes for an image."""
    regions_per_image: int = 512
    """Regions that the loss is taken of, for each image."""
    score_threshold: float = 0.05
    """Detections of a lower score are left out."""
    nms_threshold: float = 0.5
    """Of two detections of a class that overlap by a larger IoU, the one of lower score is left out."""
    max_detections: int = 100
    """Detections of an image; COCO's metric counts the best 100."""
    flip_prob: float = 0.5
    """Chance of a horizontal flip while training."""
    scale_range: tuple[float, float] = (0.8, 1.25)
    """Range of the random scale while training; 1 fits the image into `image_size`."""
    drop_path: float = 0.1
    """Rate of stochastic depth at the network's last block."""
    freeze_batch_norm: bool = True
    """Keep the statistics and weights of the network's batch norms; the batches of detection are too small for them."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images, or of the annotations, cannot be used; below, they are left
    out and reported."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused unread."""

    def __post_init__(self) -> None:
        sides = "two numbers of pixels, height and width, of 16 or more"
        require(len(self.image_size) == 2 and min(self.image_size) >= 16, "detect.image_size", self.image_size, sides)
        for name in ("channels", "head_channels", "mask_channels", "num_proposals", "regions_per_image"):
            require(getattr(self, name) >= 1, f"detect.{name}", getattr(self, name), "1 or more")
        require(self.max_detections >= 1, "detect.max_detections", self.max_detections, "1 or more")
        for name in ("anchor_scale", "max_pixels"):
            require_positive(f"detect.{name}", getattr(self, name))
        ratios = "one or more numbers above 0"
        require(min(self.anchor_ratios, default=0.0) > 0, "detect.anchor_ratios", self.anchor_ratios, ratios)
        for name in ("score_threshold", "nms_threshold", "flip_prob", "drop_path", "max_bad_share"):
            require_probability(f"detect.{name}", getattr(self, name))
        require_range("detect.scale_range", self.scale_range, 0.05, 20.0)
        choices = ("faster-rcnn", "cascade-rcnn")
        require(self.method in choices, "detect.method", self.method, " or ".join(choices))
