"""Configuration of the projection heads."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config.checks import MAX_CHANNELS, require, require_bounded, require_positive


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
        require_bounded(
            self, {"num_prototypes": 2**24, "hidden_dim": MAX_CHANNELS, "bottleneck_dim": MAX_CHANNELS}, "heads"
        )
        require(
            0 < len(self.num_prototypes) <= 64 and all(count >= 2 for count in self.num_prototypes),
            "heads.num_prototypes",
            self.num_prototypes,
            "one number of 2 or more for each head, at most 64 heads",
        )
        require_positive("heads.hidden_dim", self.hidden_dim)
        require_positive("heads.bottleneck_dim", self.bottleneck_dim)
