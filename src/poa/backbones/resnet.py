"""The elastic ResNet, with timm's names."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import ResidualBlock, TimmModel
from poa.backbones.hierarchical import HierarchicalBackbone, hide
from poa.backbones.resnet_layout import block_cuts, resnet_layout, resnet_space, stage_depths, stage_stride
from poa.config import ResNetConfig
from poa.elastic import Cut, Subnet
from poa.elastic.layers import ElasticConv2d, ElasticGroupNorm
from poa.errors import ConfigError

TIMM_STEM_CHANNELS = 64
TIMM_NUM_GROUPS = 32


class Bottleneck(ResidualBlock):
    """A residual block with a narrower middle, of which sub-networks own the leading channels (POA §3.2)."""

    def __init__(self, cuts: dict[str, Cut], stride: int, num_groups: int) -> None:
        super().__init__()
        self.conv1 = ElasticConv2d(cuts["conv1.weight"])
        self.bn1 = ElasticGroupNorm(cuts["bn1.weight"], num_groups)
        self.conv2 = ElasticConv2d(cuts["conv2.weight"], stride=stride, padding=1)
        self.bn2 = ElasticGroupNorm(cuts["bn2.weight"], num_groups)
        self.conv3 = ElasticConv2d(cuts["conv3.weight"])
        self.bn3 = ElasticGroupNorm(cuts["bn3.weight"], num_groups)
        self.downsample = nn.ModuleList()
        if "downsample.0.weight" in cuts:
            self.downsample.append(ElasticConv2d(cuts["downsample.0.weight"], stride=stride))
            self.downsample.append(ElasticGroupNorm(cuts["downsample.1.weight"], num_groups))

    def forward(self, x: Float[Tensor, "B inputs _ _"], width: int) -> Float[Tensor, "B outputs _ _"]:
        """The block's output, at its stride."""
        y = F.relu(self.bn1(self.conv1(x, width), width))
        y = F.relu(self.bn2(self.conv2(y, width), width))
        y = self.bn3(self.conv3(y, width), width)
        for layer in self.downsample:
            x = layer(x, width)
        return F.relu(y + x)


class ElasticResNet(HierarchicalBackbone):
    """The super-network: a ResNet that runs any of its sub-networks (POA §3.2).

    Its class vector is the mean of its last map. It has no stochastic depth.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_scale = config.patch_scale
        self.layout = resnet_layout(config)
        self.space = resnet_space(config)
        cuts = self.layout.cuts
        self.depths = stage_depths(config, self.space.intact)
        self.mask_token = nn.Parameter(torch.empty(cuts["mask_token"].full_shape))
        self.conv1 = ElasticConv2d(cuts["conv1.weight"], stride=2, padding=3)
        self.bn1 = ElasticGroupNorm(cuts["bn1.weight"], config.num_groups)
        self.layer1, self.layer2, self.layer3, self.layer4 = (self._stage(stage) for stage in range(4))

    def _stage(self, stage: int) -> nn.ModuleList:
        return nn.ModuleList(
            Bottleneck(block_cuts(self.config, stage, block), stage_stride(stage, block), self.config.num_groups)
            for block in range(self.depths[stage])
        )

    @property
    def stages(self) -> tuple[nn.ModuleList, ...]:
        """The blocks of the four stages."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def stage_maps(
        self,
        image: Float[Tensor, "B c h w"],
        subnet: Subnet,
        mask: Bool[Tensor, "B N"] | None = None,
        rows_rng: torch.Generator | None = None,  # noqa: ARG002 (no stochastic depth here)
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """See `HierarchicalBackbone.stage_maps`: the stem's map before its pooling, and the four stages'."""
        x: Tensor = F.relu(self.bn1(self.conv1(image, subnet.width), subnet.width))
        maps = [x]
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = hide(x, self.mask_token, mask, 8 // self.patch_scale)
        second, third = (stage.kept(depth) for stage, depth in zip(self.layout.stages, subnet.depths, strict=True))
        kept = (range(self.depths[0]), second, third, range(self.depths[3]))
        for blocks, indices in zip(self.stages, kept, strict=True):
            for index in indices:
                x = blocks[index](x, subnet.width)
            maps.append(x)
        return maps

    def read_out(
        self,
        last: Float[Tensor, "B C h w"],
        width: int,  # noqa: ARG002 (the last map has all channels at every width)
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """See `HierarchicalBackbone.read_out`."""
        return last.mean((2, 3)), last

    def timm_read_out(
        self, model: nn.Module, images: Float[Tensor, "B c H W"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C h w"]]:
        """See `HierarchicalBackbone.timm_read_out`."""
        last = model.forward_features(images)  # type: ignore[operator]
        return model.forward_head(last, pre_logits=True), last  # type: ignore[operator]

    def num_layers(self) -> int:
        """See `Backbone.num_layers`."""
        return sum(self.depths) + 1

    def layer_of(self, name: str) -> int:
        """See `Backbone.layer_of`."""
        if not name.startswith("layer"):
            return 0
        stage, block = name.removeprefix("layer").split(".")[:2]
        return sum(self.depths[: int(stage) - 1]) + int(block) + 1

    def timm_model(self, subnet: Subnet, image_size: int) -> TimmModel:
        """See `Backbone.timm_model`.

        Raises:
            ConfigError: timm has no ResNet with that stem or that number of groups.
        """
        config = self.config
        for name, timms in (("stem_channels", TIMM_STEM_CHANNELS), ("num_groups", TIMM_NUM_GROUPS)):
            if getattr(config, name) != timms:
                raise ConfigError(
                    f"networks can be cut only where model.{name} is {timms}, as in timm's ResNet; "
                    f"got {getattr(config, name)}."
                )
        arguments = {
            "in_chans": config.num_channels,
            "layers": list(stage_depths(config, subnet)),
            "channels": [config.base_channels << stage for stage in range(4)],
            "base_width": 64 * subnet.width // config.base_channels,
            "norm_layer": "groupnorm",
        }
        side = -(-image_size // 32)
        described = {
            "pool_size": [side, side],
            "fixed_input_size": False,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        return TimmModel("resnet50", arguments, described, "avg")

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights as timm does: He's normal distribution for the convolutions."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 4:
                    nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu", generator=generator)
                elif name == "mask_token" or name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.fill_(0.0 if self.config.zero_init_last and name.endswith("bn3.weight") else 1.0)
