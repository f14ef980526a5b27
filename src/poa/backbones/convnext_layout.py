"""The table of an elastic ConvNeXt: shapes, cuts, search space and cost. No torch here."""

from __future__ import annotations

import math

from poa.config import ConvNeXtConfig
from poa.elastic import Axis, Cut, Layout, SearchSpace, Stage, Subnet, elastic, fixed


def convnext_space(config: ConvNeXtConfig) -> SearchSpace:
    """The search space of that super-network."""
    return SearchSpace(config.widths, (config.depths,), config.draw_emphasis, config.draw_emphasis)


def stage_depths(config: ConvNeXtConfig, depth: int) -> tuple[int, int, int, int]:
    """The blocks of all four stages of a network of that depth."""
    first, second, last = config.other_depths
    return first, second, depth, last


def stage_channels(config: ConvNeXtConfig, stage: int) -> Axis:
    """What runs between the blocks of a stage; `stage` counts from 0."""
    return elastic(config.widths[-1] << stage, config.widths[-1], f"stream.{stage}")


def block_cuts(config: ConvNeXtConfig, stage: int, block: int) -> dict[str, Cut]:
    """The parameters of one block by timm's names; a depthwise convolution has one input at every width."""
    channels = stage_channels(config, stage)
    hidden = elastic(4 * channels.size, config.widths[-1], f"stages.{stage}.blocks.{block}.hidden")
    return {
        "conv_dw.weight": Cut((channels, fixed(1), fixed(7), fixed(7))),
        "mlp.fc1.weight": Cut((hidden, channels), fan_in=1),
        "mlp.fc1.bias": Cut((hidden,)),
        "mlp.fc2.weight": Cut((channels, hidden), fan_in=1),
        **dict.fromkeys(("conv_dw.bias", "norm.weight", "norm.bias", "mlp.fc2.bias", "gamma"), Cut((channels,))),
    }


def downsample_cuts(config: ConvNeXtConfig, stage: int) -> dict[str, Cut]:
    """The parameters between the stage before and this one, by timm's names."""
    before, channels = stage_channels(config, stage - 1), stage_channels(config, stage)
    return {
        **dict.fromkeys(("downsample.0.weight", "downsample.0.bias"), Cut((before,))),
        "downsample.1.weight": Cut((channels, before, fixed(2), fixed(2)), fan_in=1),
        "downsample.1.bias": Cut((channels,)),
    }


def convnext_layout(config: ConvNeXtConfig) -> Layout:
    """The table of that super-network."""
    first, last = stage_channels(config, 0), stage_channels(config, 3)
    cuts = {
        "mask_token": Cut((fixed(1), first)),
        "stem.0.weight": Cut((first, fixed(config.num_channels), *[fixed(config.patch_size)] * 2)),
        **dict.fromkeys(("stem.0.bias", "stem.1.weight", "stem.1.bias"), Cut((first,))),
        **dict.fromkeys(("head.norm.weight", "head.norm.bias"), Cut((last,))),
    }
    for stage, depth in enumerate(stage_depths(config, config.depths[-1])):
        parts = {"": downsample_cuts(config, stage)} if stage > 0 else {}
        parts |= {f"blocks.{block}.": block_cuts(config, stage, block) for block in range(depth)}
        cuts |= {f"stages.{stage}.{part}{name}": cut for part, inner in parts.items() for name, cut in inner.items()}
    return Layout(cuts, (Stage("stages.2.blocks", config.depths[-1]),), last, frozenset({"mask_token"}))


def convnext_flops(config: ConvNeXtConfig, subnet: Subnet, image_size: int | None = None) -> int:
    """Operations of convolutions and linear layers (2 per multiply-add) for one image; arguments as of `vit_flops`."""
    macs = 0
    for _, target, cut in convnext_layout(config).owned(subnet):
        shape = cut.shape(subnet.width)
        if len(shape) > 1:
            stage = int(target.split(".")[1]) if target.startswith("stages.") else 0
            side = (image_size or config.image_size) // (config.patch_size << stage)
            macs += side * side * math.prod(shape)
    return 2 * macs
