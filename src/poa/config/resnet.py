"""Configuration of the elastic ResNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from poa.config.checks import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_EMPHASIS,
    MAX_SIDE,
    require,
    require_bounded,
    require_few_subnets,
    require_positive,
    require_rising,
)

MIN_IMAGE_SIZE = 5
"""From this side on the first stage's map has several places, so that every normalisation group has several numbers."""

_BOUNDS = {
    **{"widths": MAX_CHANNELS, "stage2_depths": MAX_BLOCKS, "stage3_depths": MAX_BLOCKS, "outer_depths": MAX_BLOCKS},
    **{"base_channels": MAX_CHANNELS, "stem_channels": MAX_CHANNELS, "num_groups": MAX_CHANNELS},
    **{"image_size": MAX_SIDE, "num_channels": 1_024, "draw_emphasis": MAX_EMPHASIS},
}


@dataclass(frozen=True)
class ResNetConfig:
    """An elastic ResNet of bottlenecks with group normalisation: the super-network and the space of its sub-networks.

    Elastic are the middle of every bottleneck and the depths of stages 2 and 3. What runs between the blocks has the
    same channels in every sub-network.
    """

    architecture: Annotated[Literal["resnet"], tyro.conf.Suppress] = "resnet"
    widths: tuple[int, ...] = (64, 96, 128)
    """Middle channels of a bottleneck of stage 1, doubled from stage to stage; the largest is the intact network's."""
    stage2_depths: tuple[int, ...] = tuple(range(4, 9))
    """Blocks of stage 2 in the sub-networks; the largest is the intact network's."""
    stage3_depths: tuple[int, ...] = tuple(range(6, 37))
    """Blocks of stage 3 in the sub-networks; the largest is the intact network's."""
    outer_depths: tuple[int, int] = (3, 3)
    """Blocks of stages 1 and 4, in every sub-network."""
    base_channels: int = 64
    """A quarter of the channels that stage 1 gives, doubled from stage to stage (timm's channels[0])."""
    stem_channels: int = 64
    """Channels of the stem. timm has 64, so a family has too; others only from Python, to compare forward passes."""
    num_groups: int = 32
    """Groups of the normalisation. timm has 32, so a family has too; others as for `stem_channels`."""
    image_size: int = 224
    """Side of the global crops in pixels."""
    num_channels: int = 3
    """Channels of the images: 1 grey, 3 colour, 4 colour and alpha; other numbers from Python only."""
    patch_scale: int = 2
    """Places of the mask's grid along one side of a place of the last map: 1, 2 or 4."""
    zero_init_last: bool = True
    """Start every block as the identity: the gain of its last normalisation is zero (timm's zero_init_last)."""
    draw_emphasis: float = 2.0
    """How much more often the shallowest are drawn than the deepest; all widths are drawn alike."""

    def __post_init__(self) -> None:
        for name in ("widths", "stage2_depths", "stage3_depths"):
            require_rising(f"model.{name}", getattr(self, name))
        require_bounded(self, _BOUNDS)
        require_few_subnets(self.widths, self.stage2_depths, self.stage3_depths)
        for depth in self.outer_depths:
            require_positive("model.outer_depths", depth)
        for name in ("base_channels", "stem_channels", "num_groups", "num_channels"):
            require_positive(f"model.{name}", getattr(self, name))
        self._require_groups("widths", self.widths)
        self._require_groups("stem_channels", (self.stem_channels,))
        self._require_groups("base_channels", (4 * self.base_channels,))
        for width in self.widths:
            require(
                64 * width % self.base_channels == 0,
                "model.widths",
                self.widths,
                f"such that 64 × width / base_channels is a whole number, timm's base_width "
                f"(base_channels {self.base_channels})",
            )
        self.require_image_size("model.image_size", self.image_size)
        require(self.patch_scale in (1, 2, 4), "model.patch_scale", self.patch_scale, "1, 2 or 4")
        require(self.draw_emphasis >= 1.0, "model.draw_emphasis", self.draw_emphasis, "1 or more")

    def _require_groups(self, name: str, normalised: tuple[int, ...]) -> None:
        for channels in normalised:
            require(
                channels % self.num_groups == 0,
                f"model.{name}",
                getattr(self, name),
                f"such that num_groups {self.num_groups} divides the {channels} channels that are normalised",
            )

    @property
    def mask_side(self) -> int:
        """Rows and columns of the grid that masks are drawn on: those of the last map times `patch_scale`."""
        return self.patch_scale * -(-self.image_size // 32)

    @property
    def crop_multiple(self) -> int:
        """The side of any crop must be a multiple of this."""
        return 1

    def require_image_size(self, name: str, size: int) -> None:
        """Raises `ConfigError` unless networks can be cut for images of that side."""
        require(size <= MAX_SIDE, name, size, f"at most {MAX_SIDE:,}")
        require(size >= MIN_IMAGE_SIZE, name, size, f"{MIN_IMAGE_SIZE} or more, the nearest is {MIN_IMAGE_SIZE}")
