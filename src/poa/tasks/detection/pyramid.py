"""The feature pyramid between a network and a detector."""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from poa.tasks.dense.multiscale import multi_scale


class Pyramid(nn.Module):
    """FPN (Lin et al., 2017) on a network's maps at four scales, and a fifth level, the coarsest subsampled.

    Regions are pooled of the four; the fifth only proposes. The maps are those of `multi_scale`, of plain networks
    made of the last block (ViTDet; Li et al., 2022). They are projected and layer-normed first, so that stages that end
    without a norm, as those of transformers do, enter at one scale.

    Attributes:
        strides: of the five levels, finest first.
        names: likewise, as torchvision names them.

    Args:
        network: a timm model for images of the detector's size; it is looked at, not kept.
        num_channels: of every level.

    Raises:
        ConfigError: see `multi_scale`.
    """

    def __init__(self, network: nn.Module, num_channels: int) -> None:
        super().__init__()
        self.scales = multi_scale(network, num_channels=num_channels, simple=True).scales
        self.norms = nn.ModuleList(LayerNorm2d(num_channels) for _ in self.scales.strides)
        widths = list(self.scales.num_channels)
        self.fpn = FeaturePyramidNetwork(widths, num_channels, extra_blocks=LastLevelMaxPool())
        self.strides = (*self.scales.strides, 2 * self.scales.strides[-1])
        self.names = [*map(str, range(len(widths))), "pool"]

    def forward(
        self, network: nn.Module, images: Float[Tensor, "B c h w"]
    ) -> OrderedDict[str, Float[Tensor, "B _ _ _"]]:
        """The levels by name, finest first, of normalised images."""
        maps = self.scales(network, images)
        normed = [norm(part) for norm, part in zip(self.norms, maps, strict=True)]
        found: OrderedDict[str, Tensor] = self.fpn(OrderedDict(zip(self.names[:-1], normed, strict=True)))
        return found
