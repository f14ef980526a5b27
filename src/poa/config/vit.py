"""Configuration of the elastic Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from poa.config.checks import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_EMPHASIS,
    MAX_SIDE,
    require,
    require_bounded,
    require_few_subnets,
    require_non_negative,
    require_positive,
    require_rising,
)

MlpKind = Literal["gelu", "swiglu_packed", "swiglu"]
Position = Literal["learned", "rope"]

_BOUNDS = {
    **{"widths": MAX_CHANNELS, "depths": MAX_BLOCKS, "head_dim": MAX_CHANNELS, "patch_size": MAX_SIDE},
    **{"image_size": MAX_SIDE, "num_channels": 1_024, "mlp_ratio": 64, "num_reg_tokens": 1_024},
    "draw_emphasis": MAX_EMPHASIS,
}


@dataclass(frozen=True)
class ViTConfig:
    """An elastic Vision Transformer: the super-network and the space of its sub-networks.

    The largest width and depth are the intact network. A width is a number of channels, a multiple of
    `head_dim`; a depth is a number of blocks.
    """

    architecture: Annotated[Literal["vit"], tyro.conf.Suppress] = "vit"
    widths: tuple[int, ...] = (384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024)
    """Widths of the sub-networks; the largest is the intact network's."""
    depths: tuple[int, ...] = tuple(range(12, 25))
    """Depths of the sub-networks; the largest is the intact network's."""
    head_dim: int = 64
    """Channels of one attention head, the same in every sub-network."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    image_size: int = 224
    """Side of the global crops in pixels; the position embedding is made for this size."""
    num_channels: int = 3
    """Channels of the images: 1 grey, 3 colour, 4 colour and alpha; other numbers from Python only."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP (the inputs of its last layer) over the width, in the intact network."""
    mlp: MlpKind = "gelu"
    """Kind of a block's MLP: two layers with GELU between them; SwiGLU with gate and value in one matrix (DINOv2's
    giant); SwiGLU with a matrix for each (DINOv3's plus models; with position rope only)."""
    position: Position = "learned"
    """How patches know their place: a learned embedding added to them, or DINOv3's rotary embedding of queries and
    keys. Extracted networks are of timm's class VisionTransformer with learned, Eva with rope."""
    rope_temperature: float = 100.0
    """With position rope: the longest period over the shortest, nearly."""
    qkv_bias: bool = True
    """A bias on queries, keys and values; with position rope on queries and values only, as in DINOv3."""
    norm_eps: float = 1e-6
    """Added to the variance in every LayerNorm: 1e-6; with position rope also 1e-5 (DINOv3's)."""
    num_reg_tokens: int = 0
    """Register tokens beside the class token (timm's reg_tokens)."""
    no_embed_class: bool = False
    """Leave class and register tokens out of the position embedding (timm's no_embed_class)."""
    init_values: float | None = 1e-5
    """Start of LayerScale; None leaves LayerScale out."""
    init_std: float = 0.02
    """Standard deviation of fresh weights; 0.02 suits widths of some hundreds, narrow networks need more."""
    drop_path: float = 0.2
    """Stochastic depth: share of a batch's rows that each block of the students leaves out."""
    draw_emphasis: float = 3.0
    """How much more often the narrowest and the shallowest are drawn than the widest and the deepest."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            require_rising(f"model.{name}", getattr(self, name))
        require_bounded(self, _BOUNDS)
        require_few_subnets(self.widths, self.depths)
        require_positive("model.head_dim", self.head_dim)
        for width in self.widths:
            require(
                width % self.head_dim == 0,
                "model.widths",
                self.widths,
                f"multiples of head_dim {self.head_dim}",
            )
        require_positive("model.patch_size", self.patch_size)
        self.require_image_size("model.image_size", self.image_size)
        require_positive("model.num_channels", self.num_channels)
        self._require_blocks()
        require_non_negative("model.num_reg_tokens", self.num_reg_tokens)
        if self.init_values is not None:
            require_positive("model.init_values", self.init_values)
        require_positive("model.init_std", self.init_std)
        require(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "0 or more and less than 1")
        require(self.draw_emphasis >= 1.0, "model.draw_emphasis", self.draw_emphasis, "1 or more")

    def _require_blocks(self) -> None:
        """What timm's stock classes can be made with."""
        require(self.mlp in get_args(MlpKind), "model.mlp", self.mlp, _one_of(get_args(MlpKind)))
        require(self.position in get_args(Position), "model.position", self.position, _one_of(get_args(Position)))
        require_positive("model.mlp_ratio", self.mlp_ratio)
        require(
            self.hidden_channels * self.widths[0] >= self.widths[-1],
            "model.mlp_ratio",
            self.mlp_ratio,
            f"so large that the width {self.widths[0]} has a hidden channel",
        )
        require_positive("model.rope_temperature", self.rope_temperature)
        if self.position == "rope":
            require(self.head_dim % 4 == 0, "model.head_dim", self.head_dim, "a multiple of 4 with position rope")
            require(not self.no_embed_class, "model.no_embed_class", self.no_embed_class, "False with position rope")
            epsilons = (1e-6, 1e-5) if self.init_values is not None else (1e-6,)
            require(
                self.norm_eps in epsilons,
                "model.norm_eps",
                self.norm_eps,
                "1e-06 or, with model.init_values, 1e-05",
            )
        else:
            require(self.mlp != "swiglu", "model.mlp", self.mlp, "gelu or swiglu_packed with learned positions")
            require(self.norm_eps == 1e-6, "model.norm_eps", self.norm_eps, "1e-06 with learned positions")
            temperature = self.rope_temperature
            require(temperature == 100.0, "model.rope_temperature", temperature, "left alone with learned positions")

    @property
    def hidden_channels(self) -> int:
        """Hidden channels of a block's MLP in the intact network."""
        return int(self.widths[-1] * self.mlp_ratio)

    @property
    def mask_side(self) -> int:
        """Rows and columns of the grid that masks are drawn on: the patches."""
        return self.image_size // self.patch_size

    @property
    def crop_multiple(self) -> int:
        """The side of any crop must be a multiple of this."""
        return self.patch_size

    def require_image_size(self, name: str, size: int) -> None:
        """Raises `ConfigError` unless networks can be cut for images of that side."""
        require(size <= MAX_SIDE, name, size, f"at most {MAX_SIDE:,}")
        nearest = max(self.patch_size, round(size / self.patch_size) * self.patch_size)
        require(
            size > 0 and size % self.patch_size == 0,
            name,
            size,
            f"a multiple of the patch size {self.patch_size}, the nearest is {nearest}",
        )


def _one_of(names: tuple[str, ...]) -> str:
    return f"one of {', '.join(names)}"
