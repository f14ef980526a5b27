"""The table of an elastic Vision Transformer: shapes, cuts, search space and cost. No torch here."""

from __future__ import annotations

import math

from poa.config import ViTConfig
from poa.elastic import Cut, Layout, SearchSpace, Stage, Subnet, elastic, fixed


def vit_space(config: ViTConfig) -> SearchSpace:
    """The search space of that super-network."""
    return SearchSpace(config.widths, (config.depths,), config.draw_emphasis, config.draw_emphasis)


def block_cuts(width: int, mlp_ratio: int, layer_scale: bool) -> dict[str, Cut]:
    """The parameters of one block by timm's names; `width` is the intact network's."""
    channels = elastic(width, width)
    stacked = elastic(3 * width, width, num_groups=3)
    hidden = elastic(mlp_ratio * width, width)
    scales = {"ls1.gamma": Cut((channels,)), "ls2.gamma": Cut((channels,))} if layer_scale else {}
    return {
        "norm1.weight": Cut((channels,)),
        "norm1.bias": Cut((channels,)),
        "attn.qkv.weight": Cut((stacked, channels), fan_in=1),
        "attn.qkv.bias": Cut((stacked,)),
        "attn.proj.weight": Cut((channels, channels), fan_in=1),
        "attn.proj.bias": Cut((channels,)),
        "norm2.weight": Cut((channels,)),
        "norm2.bias": Cut((channels,)),
        "mlp.fc1.weight": Cut((hidden, channels), fan_in=1),
        "mlp.fc1.bias": Cut((hidden,)),
        "mlp.fc2.weight": Cut((channels, hidden), fan_in=1),
        "mlp.fc2.bias": Cut((channels,)),
        **scales,
    }


def vit_layout(config: ViTConfig) -> Layout:
    """The table of that super-network."""
    width = config.widths[-1]
    depth = config.depths[-1]
    channels = elastic(width, width)
    patch = fixed(config.patch_size)
    num_prefix = 1 + config.num_reg_tokens
    num_positions = num_patches(config) + (0 if config.no_embed_class else num_prefix)
    registers = {"reg_token": Cut((fixed(1), fixed(config.num_reg_tokens), channels))}
    block = block_cuts(width, config.mlp_ratio, config.init_values is not None)
    return Layout(
        cuts={
            "cls_token": Cut((fixed(1), fixed(1), channels)),
            **(registers if config.num_reg_tokens else {}),
            "pos_embed": Cut((fixed(1), fixed(num_positions), channels)),
            "mask_token": Cut((fixed(1), channels)),
            "patch_embed.proj.weight": Cut((channels, fixed(config.num_channels), patch, patch)),
            "patch_embed.proj.bias": Cut((channels,)),
            **{f"blocks.{index}.{name}": cut for index in range(depth) for name, cut in block.items()},
            "norm.weight": Cut((channels,)),
            "norm.bias": Cut((channels,)),
        },
        stages=(Stage("blocks", depth),),
        training_only=frozenset({"mask_token"}),
    )


def num_patches(config: ViTConfig, image_size: int | None = None) -> int:
    """Patches of an image of that size (the model's own by default)."""
    return ((image_size or config.image_size) // config.patch_size) ** 2


def vit_flops(config: ViTConfig, subnet: Subnet, image_size: int | None = None) -> int:
    """Floating-point operations of one forward pass on one image, from the table of shapes.

    Matrix products only (2 per multiply-add), as profilers count: patch embedding, the blocks' linear layers,
    and attention's two products. Norms, activations and softmax are left out.

    Args:
        config: the super-network.
        subnet: the sub-network.
        image_size: side in pixels; the model's own by default.
    """
    patches = num_patches(config, image_size)
    tokens = patches + 1 + config.num_reg_tokens
    macs = 0
    for _, target, cut in vit_layout(config).owned(subnet):
        shape = cut.shape(subnet.width)
        if target.startswith("blocks.") and len(shape) == 2:
            macs += tokens * math.prod(shape)
        elif target == "patch_embed.proj.weight":
            macs += patches * math.prod(shape)
    macs += 2 * subnet.depths[0] * tokens * tokens * subnet.width
    return 2 * macs
