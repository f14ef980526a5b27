"""Configuration of the elastic ConvNeXt."""

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

_BOUNDS = {
    **{"widths": MAX_CHANNELS, "depths": MAX_BLOCKS, "other_depths": MAX_BLOCKS},
    **{"image_size": MAX_SIDE, "num_channels": 1_024, "draw_emphasis": MAX_EMPHASIS},
}


@dataclass(frozen=True)
class ConvNeXtConfig:
    """An elastic ConvNeXt: the super-network and the space of its sub-networks.

    A width is the number of channels of stage 1, doubled from stage to stage; a depth is that of stage 3. The default
    space reaches from ConvNeXt-S (intact) over ConvNeXt-T down to the channels of timm's nano and pico.
    """

    architecture: Annotated[Literal["convnext"], tyro.conf.Suppress] = "convnext"
    widths: tuple[int, ...] = (64, 80, 96)
    """Widths of the sub-networks in stage 1; the largest is the intact network's."""
    depths: tuple[int, ...] = tuple(range(9, 28))
    """Depths of the sub-networks in stage 3; the largest is the intact network's."""
    other_depths: tuple[int, int, int] = (3, 3, 3)
    """Blocks of the stages 1, 2 and 4, the same in every sub-network."""
    patch_size: int = 4
    """Side of a patch in pixels: 4, or 1 for small images."""
    image_size: int = 224
    """Side of the global crops in pixels, a multiple of 8 patches."""
    num_channels: int = 3
    """Channels of the images: 1 grey, 3 colour, 4 colour and alpha; other numbers from Python only."""
    patch_scale: int = 2
    """Rows and columns of masks and patch vectors for each row and column of the last map: 1, 2, 4 or 8."""
    init_values: float = 1e-6
    """Start of LayerScale (timm's ls_init_value)."""
    init_std: float = 0.02
    """Standard deviation of fresh weights; 0.02 suits widths of some hundreds, narrow networks need more."""
    drop_path: float = 0.2
    """Stochastic depth of the last block; it rises linearly from 0 in the first."""
    draw_emphasis: float = 2.0
    """How much more often the narrowest and the shallowest are drawn than the widest and the deepest."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            require_rising(f"model.{name}", getattr(self, name))
        require_bounded(self, _BOUNDS)
        require_few_subnets(self.widths, self.depths)
        for depth in self.other_depths:
            require_positive("model.other_depths", depth)
        for name, allowed in {"patch_size": (1, 4), "patch_scale": (1, 2, 4, 8)}.items():
            value = getattr(self, name)
            require(value in allowed, f"model.{name}", value, f"one of {', '.join(map(str, allowed))}")
        self.require_image_size("model.image_size", self.image_size)
        require(self.image_size % self.stride == 0, "model.image_size", self.image_size, f"a multiple of {self.stride}")
        for name in ("num_channels", "init_values", "init_std"):
            require_positive(f"model.{name}", getattr(self, name))
        require(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "0 or more and less than 1")
        require(self.draw_emphasis >= 1.0, "model.draw_emphasis", self.draw_emphasis, "1 or more")

    @property
    def stride(self) -> int:
        """Pixels of the image along a side for one place of the last map."""
        return 8 * self.patch_size

    @property
    def mask_side(self) -> int:
        """Rows and columns of the grid that masks are drawn on: those of the last map times `patch_scale`."""
        return self.patch_scale * self.image_size // self.stride

    @property
    def crop_multiple(self) -> int:
        """The side of any crop must be a multiple of this."""
        return 1

    def require_image_size(self, name: str, size: int) -> None:
        """Raises `ConfigError` unless networks can be cut for images of that side: unless the last map has a place."""
        require(size <= MAX_SIDE, name, size, f"at most {MAX_SIDE:,}")
        require(size >= self.stride, name, size, f"{self.stride} or more, the nearest is {self.stride}")
