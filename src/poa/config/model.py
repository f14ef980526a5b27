"""Configuration of the elastic backbones and of the projection heads."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config.checks import require, require_non_negative, require_positive


@dataclass(frozen=True)
class ViTConfig:
    """An elastic Vision Transformer: the super-network and the space of its sub-networks.

    The largest width and depth are the intact network. A width is a number of channels, a multiple of
    `head_dim`; a depth is a number of blocks.
    """

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
    mlp_ratio: int = 4
    """Hidden channels of a block's MLP over the width."""
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
            values = getattr(self, name)
            require(
                bool(values) and list(values) == sorted(set(values)) and values[0] > 0,
                f"model.{name}",
                values,
                "positive numbers in rising order, none twice",
            )
        require_positive("model.head_dim", self.head_dim)
        for width in self.widths:
            require(
                width % self.head_dim == 0,
                "model.widths",
                self.widths,
                f"multiples of head_dim {self.head_dim}",
            )
        require_positive("model.patch_size", self.patch_size)
        require(
            self.image_size > 0 and self.image_size % self.patch_size == 0,
            "model.image_size",
            self.image_size,
            f"a multiple of model.patch_size {self.patch_size}",
        )
        require_positive("model.num_channels", self.num_channels)
        require_positive("model.mlp_ratio", self.mlp_ratio)
        require_non_negative("model.num_reg_tokens", self.num_reg_tokens)
        require_positive("model.init_std", self.init_std)
        require(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "0 or more and less than 1")
        require(self.draw_emphasis >= 1.0, "model.draw_emphasis", self.draw_emphasis, "1 or more")


@dataclass(frozen=True)
class HeadsConfig:
    """The projection heads: each an MLP, L2 normalisation and a weight-normalised layer onto its prototypes."""

    num_prototypes: tuple[int, ...] = (8192, 16384, 32768, 65536)
    """Prototypes of each head; as many heads as numbers."""
    hidden_dim: int = 2048
    """Hidden channels of the MLP."""
    bottleneck_dim: int = 256
    """Channels that the prototypes live in."""

    def __post_init__(self) -> None:
        require(
            bool(self.num_prototypes) and all(count >= 2 for count in self.num_prototypes),
            "heads.num_prototypes",
            self.num_prototypes,
            "one number of 2 or more for each head",
        )
        require_positive("heads.hidden_dim", self.hidden_dim)
        require_positive("heads.bottleneck_dim", self.bottleneck_dim)
