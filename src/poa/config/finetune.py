"""Configuration of fine-tuning for classification."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config.checks import (
    require,
    require_non_negative,
    require_positive,
    require_probability,
    require_range,
)


@dataclass(frozen=True)
class FinetuneConfig:
    """How images reach the network, and what keeps it from learning them by heart."""

    image_size: int | None = None
    """Side of the images in pixels; the network's own by default."""
    drop_path: float | None = None
    """Rate of stochastic depth at the last block; by default 0.1 where the network has it, else 0."""
    label_smoothing: float = 0.1
    """Share of the label spread over all classes; of several labels: how far 0 and 1 move towards one half, times 2."""
    mixup: float = 0.8
    """α of mixup's Beta distribution (Zhang et al., 2018); 0: no mixup."""
    cutmix: float = 1.0
    """α of CutMix' Beta distribution (Yun et al., 2019); 0: no CutMix. With both, each step takes one of them."""
    mix_prob: float = 1.0
    """Chance that the images of a step are mixed."""
    crop_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the image's area that a random crop covers."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop before resizing."""
    flip_prob: float = 0.5
    """Chance of a horizontal flip; 0 where left and right differ in meaning, as of digits."""
    color_jitter: float = 0.0
    """Strength of the jitter of brightness, contrast and saturation: factors in 1 ± this."""
    randaugment_ops: int = 2
    """Operations of RandAugment (Cubuk et al., 2020) on every image; 0: none. For grey and colour images."""
    randaugment_magnitude: int = 9
    """Their strength, 0 to 30."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            require_positive("--image-size", self.image_size)
        require(self.drop_path is None or 0 <= self.drop_path < 1, "--drop-path", self.drop_path, "from 0 to below 1")
        require(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "from 0 to below 1")
        for name in ("mixup", "cutmix"):
            require_non_negative(f"--{name}", getattr(self, name))
        for name in ("mix_prob", "flip_prob", "color_jitter"):
            require_probability(f"--{name.replace('_', '-')}", getattr(self, name))
        require_range("--crop-scale", self.crop_scale, 1e-4, 1.0)
        require_range("--aspect", self.aspect, 0.05, 20.0)
        require(self.randaugment_ops >= 0, "--randaugment-ops", self.randaugment_ops, "0 or more")
        magnitude = self.randaugment_magnitude
        require(0 <= magnitude <= 30, "--randaugment-magnitude", magnitude, "from 0 to 30")


@dataclass(frozen=True)
class ElasticConfig:
    """How a whole family is fine-tuned at once: each step trains the intact network and one sub-network."""

    intact_weight: float = 0.5
    """λ: the intact network's share of the loss; the sub-network has the rest (POA eq. 5)."""
    distill_weight: float = 1.0
    """Weight of what the sub-network learns from the intact network's answer to the same images (POA eq. 4)."""
    distill_temp: float = 1.0
    """Temperature of both answers there."""

    def __post_init__(self) -> None:
        require(0 < self.intact_weight < 1, "--intact-weight", self.intact_weight, "between 0 and 1, both excluded")
        require_non_negative("--distill-weight", self.distill_weight)
        require_positive("--distill-temp", self.distill_temp)
