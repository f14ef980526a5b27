"""The elastic ConvNeXt, with timm's names."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.backbones.base import ResidualBlock, TimmModel
from poa.backbones.convnext_layout import block_cuts, convnext_layout, convnext_space, downsample_cuts, stage_depths
from poa.backbones.hierarchical import HierarchicalBackbone, draw_kept_rows, hide
from poa.backbones.vit_blocks import Mlp
from poa.config import ConvNeXtConfig
from poa.elastic import Cut, Subnet
from poa.elastic.layers import ElasticConv2d, ElasticLayerNorm2d

Map = Float[Tensor, "B C h w"]


class Block(ResidualBlock):
    """A residual block: a depthwise convolution, then an MLP at each place."""

    def __init__(self, cuts: dict[str, Cut]) -> None:
        super().__init__()
        self.conv_dw = ElasticConv2d(cuts["conv_dw.weight"], cuts["conv_dw.bias"], padding=3, depthwise=True)
        self.norm = ElasticLayerNorm2d(cuts["norm.weight"])
        self.mlp = Mlp(cuts)
        self.gamma_cut = cuts["gamma"]
        self.gamma = nn.Parameter(torch.empty(cuts["gamma"].full_shape))

    def forward(self, x: Map, width: int, kept: Float[Tensor, "B"] | None) -> Map:
        """The block's output; `kept` has each row's factor of the branch, or None."""
        y: Tensor = self.norm(self.conv_dw(x, width), width).permute(0, 2, 3, 1)
        y = self.mlp(y.flatten(0, 2), width).view(y.shape) * self.gamma_cut.apply(self.gamma, width)
        return x + (y if kept is None else y * kept.view(-1, 1, 1, 1)).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    """The blocks of one resolution, and what leads to it."""

    def __init__(self, config: ConvNeXtConfig, stage: int) -> None:
        super().__init__()
        self.downsample = nn.ModuleList()
        if stage > 0:
            cuts = downsample_cuts(config, stage)
            conv = ElasticConv2d(cuts["downsample.1.weight"], cuts["downsample.1.bias"], stride=2)
            self.downsample.extend([ElasticLayerNorm2d(cuts["downsample.0.weight"]), conv])
        depth = stage_depths(config, config.depths[-1])[stage]
        self.blocks = nn.ModuleList(Block(block_cuts(config, stage, block)) for block in range(depth))


class ElasticConvNeXt(HierarchicalBackbone):
    """The super-network: a ConvNeXt that runs any of its sub-networks.

    Width is elastic everywhere, depth in stage 3. Crops too small for a place of the last map are padded with zeros.
    """

    embedding = "stem."

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_scale = config.patch_scale
        self.layout = convnext_layout(config)
        self.space = convnext_space(config)
        self.depths = stage_depths(config, config.depths[-1])
        cuts = self.layout.cuts
        self.mask_token = nn.Parameter(torch.empty(cuts["mask_token"].full_shape))
        embed = ElasticConv2d(cuts["stem.0.weight"], cuts["stem.0.bias"], stride=config.patch_size)
        self.stem = nn.ModuleList([embed, ElasticLayerNorm2d(cuts["stem.1.weight"])])
        self.stages = nn.ModuleList(ConvNeXtStage(config, stage) for stage in range(4))
        self.head = nn.ModuleDict({"norm": ElasticLayerNorm2d(cuts["head.norm.weight"])})

    def stage_maps(
        self,
        image: Float[Tensor, "B c h w"],
        subnet: Subnet,
        mask: Bool[Tensor, "B N"] | None = None,
        rows_rng: torch.Generator | None = None,
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """See `HierarchicalBackbone.stage_maps`: the maps after each stage."""
        down, right = (max(0, self.config.stride - side) for side in image.shape[-2:])
        x = F.pad(image, (0, right, 0, down))
        x = self.stem[1](self.stem[0](x, subnet.width), subnet.width)
        token = self.layout.cuts["mask_token"].apply(self.mask_token, subnet.width)
        x = hide(x, token, mask, 8 // self.patch_scale)
        maps = []
        for number in range(4):
            stage: Any = self.stages[number]
            for layer in stage.downsample:
                x = layer(x, subnet.width)
            kept = self.layout.stages[0].kept(subnet.depths[0]) if number == 2 else range(self.depths[number])
            for block in kept:
                rate = self.config.drop_path * (sum(self.depths[:number]) + block) / (sum(self.depths) - 1)
                x = stage.blocks[block](x, subnet.width, draw_kept_rows(x.shape[0], rate, rows_rng, x.device))
            maps.append(x)
        return maps

    def read_out(self, last: Map, width: int) -> tuple[Float[Tensor, "B C"], Map]:
        """See `HierarchicalBackbone.read_out`: the norm of the mean, and of each place."""
        norm = self.head["norm"]
        return norm(last.mean((2, 3), keepdim=True), width).flatten(1), norm(last, width)

    def timm_read_out(self, model: nn.Module, images: Float[Tensor, "B c H W"]) -> tuple[Float[Tensor, "B C"], Map]:
        """See `HierarchicalBackbone.timm_read_out`."""
        last = model.forward_features(images)  # type: ignore[operator]
        return model.forward_head(last, pre_logits=True), model.head.norm(last)  # type: ignore[operator]

    def num_layers(self) -> int:
        """See `Backbone.num_layers`."""
        return sum(self.depths) + 2

    def layer_of(self, name: str) -> int:
        """See `Backbone.layer_of`; what leads to a stage belongs to the stage's first block."""
        if not name.startswith("stages."):
            return self.num_layers() - 1 if name.startswith("head.") else 0
        _, stage, part, block = name.split(".")[:4]
        return sum(self.depths[: int(stage)]) + (int(block) if part == "blocks" else 0) + 1

    def timm_model(self, subnet: Subnet, image_size: int) -> TimmModel:
        """See `Backbone.timm_model`."""
        arguments = {
            "in_chans": self.config.num_channels,
            "patch_size": self.config.patch_size,
            "dims": [subnet.width << stage for stage in range(4)],
            "depths": list(stage_depths(self.config, subnet.depths[0])),
            "ls_init_value": self.config.init_values,
        }
        described = {"first_conv": "stem.0", "classifier": "head.fc", "fixed_input_size": False}
        described["pool_size"] = [image_size // self.config.stride] * 2
        return TimmModel("convnext_tiny", arguments, described, "avg")

    def init_weights_(self, generator: torch.Generator) -> None:
        """Draws fresh weights as timm does: truncated normal, mask token and biases 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1 and name != "mask_token":
                    nn.init.trunc_normal_(parameter, std=self.config.init_std, generator=generator)
                else:
                    start = self.config.init_values if name.endswith("gamma") else float(name.endswith("weight"))
                    parameter.fill_(start)
