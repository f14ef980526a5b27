"""Configuration of the elastic Swin Transformer."""

from __future__ import annotations

import itertools
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
    **{"widths": MAX_CHANNELS, "depths": MAX_BLOCKS, "other_depths": MAX_BLOCKS, "head_dim": MAX_CHANNELS},
    **{"window_size": 256, "patch_size": MAX_SIDE, "image_size": MAX_SIDE, "num_channels": 1_024, "mlp_ratio": 64},
    "draw_emphasis": MAX_EMPHASIS,
}


@dataclass(frozen=True)
class SwinConfig:
    """An elastic Swin Transformer: the super-network and the space of its sub-networks.

    The largest width and depth are the intact network. A width is the number of channels of stage 1, a multiple of
    `head_dim`; every further stage has twice as many. A depth is the number of blocks of stage 3.
    """

    architecture: Annotated[Literal["swin"], tyro.conf.Suppress] = "swin"
    widths: tuple[int, ...] = (96, 112, 128)
    """Widths of the sub-networks in stage 1; the largest is the intact network's."""
    depths: tuple[int, ...] = tuple(range(6, 19))
    """Depths of the sub-networks in stage 3; the largest is the intact network's."""
    other_depths: tuple[int, int, int] = (2, 2, 2)
    """Blocks of the stages 1, 2 and 4, the same in every sub-network."""
    head_dim: int = 16
    """Channels of one attention head, the same in every sub-network and stage."""
    window_size: int = 7
    """Side of an attention window in places of the map."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    image_size: int = 224
    """Side of the global crops in pixels; the tables of relative positions are made for this size."""
    num_channels: int = 3
    """Channels of the images: 1 grey, 3 colour, 4 colour and alpha; other numbers from Python only."""
    mlp_ratio: int = 4
    """Hidden channels of a block's MLP over the width."""
    patch_scale: int = 2
    """Rows and columns of masks and patch vectors for each row and column of the last map: 1, 2 or 4."""
    always_partition: bool = False
    """Keep windows at their size, and shift them, on maps that they cover too, as the POA reference does (timm's
    always_partition). Without it such a map is one window of its own size, as in the original Swin."""
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
        for name in ("head_dim", "window_size", "patch_size", "num_channels", "mlp_ratio", "init_std"):
            require_positive(f"model.{name}", getattr(self, name))
        for width in self.widths:
            require(width % self.head_dim == 0, "model.widths", self.widths, f"multiples of head_dim {self.head_dim}")
        require(
            len(self.other_depths) == 3 and min(self.other_depths) > 0,
            "model.other_depths",
            self.other_depths,
            "three positive numbers",
        )
        require(self.patch_scale in (1, 2, 4), "model.patch_scale", self.patch_scale, "1, 2 or 4")
        self._require_size("model.image_size", self.image_size, own=True)
        require(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "0 or more and less than 1")
        require(self.draw_emphasis >= 1.0, "model.draw_emphasis", self.draw_emphasis, "1 or more")

    @property
    def mask_side(self) -> int:
        """Rows and columns of the grid that masks are drawn on: `patch_scale` for each of the last map."""
        return self.map_sides(self.image_size)[-1] * self.patch_scale

    @property
    def crop_multiple(self) -> int:
        """The side of any crop must be a multiple of this: crops are padded to whole patches, so any side runs."""
        return 1

    @property
    def windows(self) -> tuple[int, ...]:
        """For each stage the side of the window that its tables of relative positions are made for."""
        sides = self.map_sides(self.image_size)
        return tuple(self.window_size if self.always_partition else min(self.window_size, side) for side in sides)

    def map_sides(self, image_side: int) -> tuple[int, ...]:
        """For each stage the side of its map, for images of that side."""
        side = -(-image_side // self.patch_size)
        sides = [side]
        for _ in range(3):
            side = -(-side // 2)
            sides.append(side)
        return tuple(sides)

    def require_image_size(self, name: str, size: int) -> None:
        """Raises `ConfigError` unless networks can be cut for images of that side.

        timm pads a map after it has shifted it, the super-network before (as the POA reference). The two agree where
        windows need no padding and where the shift leaves a small map in its place. Beyond that no stage may need a
        larger table of relative positions than the super-network has.
        """
        self._require_size(name, size, own=False)

    def _require_size(self, name: str, size: int, *, own: bool) -> None:
        require(size <= MAX_SIDE, name, size, f"at most {MAX_SIDE:,}")
        patch = self.patch_size
        if size > 0 and size % patch == 0 and self._can_be_cut(size, own=own):
            return
        base = max(1, round(size / patch))
        nearest = next(
            side * patch
            for distance in itertools.count()
            for side in (base - distance, base + distance)
            if side > 0 and self._can_be_cut(side * patch, own=own)
        )
        expected = (
            f"a multiple of the patch size {patch} whose maps fall into windows of {self.window_size} without padding "
            f"in every stage, and into none larger than at model.image_size; the nearest is {nearest}"
        )
        require(False, name, size, expected)

    def _can_be_cut(self, size: int, *, own: bool) -> bool:
        window = self.window_size
        sides = self.map_sides(size)
        if self.always_partition:
            half = window // 2 if window % 2 == 0 else 0
            return all(side % window == 0 or (half > 0 and half % side == 0) for side in sides)
        if not own and any(min(window, side) > table for side, table in zip(sides, self.windows, strict=True)):
            return False
        return all(side <= window or side % window == 0 for side in sides)
