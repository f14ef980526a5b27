"""The table of an elastic Swin Transformer: shapes, cuts, search space and cost. No torch here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from poa.config import SwinConfig
from poa.elastic import Axis, Cut, Layout, SearchSpace, Stage, Subnet, elastic, fixed


class AxisWindows(NamedTuple):
    """How one side of a map is cut into windows."""

    window: int
    """Side of a window."""
    padded: int
    """Side of the map after padding to whole windows."""
    shift: int
    """By how much a shifted block moves the map."""


def axis_windows(side: int, window: int, *, always_partition: bool) -> AxisWindows:
    """The windows along one side of a map: a side that one window covers is that window, and is not shifted.

    Args:
        side: of the map.
        window: the stage's window (`SwinConfig.windows`).
        always_partition: windows keep their size, and are shifted, however small the map.
    """
    if side <= window and not always_partition:
        return AxisWindows(side, side, 0)
    return AxisWindows(window, -(-side // window) * window, window // 2)


def alternating_blocks(num_blocks: int, depth: int) -> tuple[int, ...]:
    """The blocks that a sub-network of that depth keeps: i_k = k + 2⌊k·s/(d − 1)⌋ with s = ⌊(D − d)/2⌋.

    Block k of the sub-network has the parity of its number in the super-network, so that plain and shifted windows
    alternate in both (docs/decisions.md).
    """
    if depth == 1:
        return (0,)
    pairs = (num_blocks - depth) // 2
    return tuple(index + 2 * (index * pairs // (depth - 1)) for index in range(depth))


def stage_depths(config: SwinConfig) -> tuple[int, int, int, int]:
    """The blocks of each stage of the intact network."""
    first, second, fourth = config.other_depths
    return first, second, config.depths[-1], fourth


def swin_space(config: SwinConfig) -> SearchSpace:
    """The search space of that super-network."""
    return SearchSpace(config.widths, (config.depths,), config.draw_emphasis, config.draw_emphasis)


def stream(config: SwinConfig, stage: int) -> Axis:
    """The channels of a stage's map."""
    width = config.widths[-1]
    return elastic(width << stage, width, f"stream.{stage}")


def block_cuts(config: SwinConfig, stage: int, block: int) -> dict[str, Cut]:
    """The parameters of one block by timm's names."""
    width = config.widths[-1]
    channels = stream(config, stage)
    prefix = f"layers.{stage}.blocks.{block}"
    heads = elastic(channels.size, width, f"{prefix}.heads", unit=config.head_dim)
    stacked = replace(heads, size=3 * heads.size, num_groups=3)
    each_head = replace(heads, size=heads.size // config.head_dim, unit=1)
    hidden = elastic(config.mlp_ratio * channels.size, width, f"{prefix}.hidden")
    offsets = fixed((2 * config.windows[stage] - 1) ** 2)
    return {
        "norm1.weight": Cut((channels,)),
        "norm1.bias": Cut((channels,)),
        "attn.relative_position_bias_table": Cut((offsets, each_head)),
        "attn.qkv.weight": Cut((stacked, channels), fan_in=1),
        "attn.qkv.bias": Cut((stacked,)),
        "attn.proj.weight": Cut((channels, heads), fan_in=1),
        "attn.proj.bias": Cut((channels,)),
        "norm2.weight": Cut((channels,)),
        "norm2.bias": Cut((channels,)),
        "mlp.fc1.weight": Cut((hidden, channels), fan_in=1),
        "mlp.fc1.bias": Cut((hidden,)),
        "mlp.fc2.weight": Cut((channels, hidden), fan_in=1),
        "mlp.fc2.bias": Cut((channels,)),
    }


def merging_cuts(config: SwinConfig, stage: int) -> dict[str, Cut]:
    """The parameters of the patch merging before a stage by timm's names."""
    below = stream(config, stage - 1)
    four = replace(below, size=4 * below.size, num_groups=4)
    return {
        "norm.weight": Cut((four,)),
        "norm.bias": Cut((four,)),
        "reduction.weight": Cut((stream(config, stage), four), fan_in=1),
    }


def swin_layout(config: SwinConfig) -> Layout:
    """The table of that super-network."""
    embedded, last = stream(config, 0), stream(config, 3)
    patch = fixed(config.patch_size)
    cuts = {
        "mask_token": Cut((fixed(1), embedded)),
        "patch_embed.proj.weight": Cut((embedded, fixed(config.num_channels), patch, patch)),
        "patch_embed.proj.bias": Cut((embedded,)),
        "patch_embed.norm.weight": Cut((embedded,)),
        "patch_embed.norm.bias": Cut((embedded,)),
    }
    for stage, depth in enumerate(stage_depths(config)):
        if stage > 0:
            cuts |= {f"layers.{stage}.downsample.{name}": cut for name, cut in merging_cuts(config, stage).items()}
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            cuts |= {f"{prefix}.{name}": cut for name, cut in block_cuts(config, stage, block).items()}
    return Layout(
        cuts={**cuts, "norm.weight": Cut((last,)), "norm.bias": Cut((last,))},
        stages=(Stage("layers.2.blocks", config.depths[-1], alternating_blocks),),
        features=last,
        training_only=frozenset({"mask_token"}),
    )


def swin_flops(config: SwinConfig, subnet: Subnet, image_size: int | None = None) -> int:
    """Floating-point operations of one forward pass on one image, from the table of shapes.

    Matrix products only (2 per multiply-add), as profilers count: patch embedding, linear layers, and attention's two
    products; in attention the padding of windows counts too. Norms, activations and softmax are left out.

    Args:
        config: the super-network.
        subnet: the sub-network.
        image_size: side in pixels; the model's own by default.
    """
    sides = config.map_sides(image_size or config.image_size)
    macs = 0
    for _, target, cut in swin_layout(config).owned(subnet):
        shape = cut.shape(subnet.width)
        if not target.endswith(".weight") or len(shape) == 1:
            continue
        stage = int(target.split(".")[1]) if target.startswith("layers.") else 0
        axis = axis_windows(sides[stage], config.windows[stage], always_partition=config.always_partition)
        places = axis.padded if ".attn." in target else sides[stage]
        macs += places**2 * math.prod(shape)
        if target.endswith("attn.qkv.weight"):
            macs += 2 * axis.padded**2 * axis.window**2 * shape[1]
    return 2 * macs
