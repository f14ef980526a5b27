"""The table of an elastic Vision Transformer: shapes, cuts, search space and cost. No torch here."""

from __future__ import annotations

import math
from dataclasses import replace

from poa.config import ViTConfig
from poa.elastic import Axis, Cut, Layout, SearchSpace, Stage, Subnet, elastic, fixed


def vit_space(config: ViTConfig) -> SearchSpace:
    """The search space of that super-network."""
    return SearchSpace(config.widths, (config.depths,), config.draw_emphasis, config.draw_emphasis)


def block_cuts(config: ViTConfig, block: int) -> dict[str, Cut]:
    """The parameters of one block by timm's names: VisionTransformer's, with position rope Eva's."""
    width = config.widths[-1]
    channels = elastic(width, width, "stream")
    heads = elastic(width, width, f"blocks.{block}.heads", unit=config.head_dim)
    hidden = elastic(config.hidden_channels, width, f"blocks.{block}.hidden")
    scales = ("gamma_1", "gamma_2") if config.position == "rope" else ("ls1.gamma", "ls2.gamma")
    return {
        "norm1.weight": Cut((channels,)),
        "norm1.bias": Cut((channels,)),
        **_attention_cuts(config, channels, heads),
        "norm2.weight": Cut((channels,)),
        "norm2.bias": Cut((channels,)),
        **_mlp_cuts(config, channels, hidden),
        **({name: Cut((channels,)) for name in scales} if config.init_values is not None else {}),
    }


def _attention_cuts(config: ViTConfig, channels: Axis, heads: Axis) -> dict[str, Cut]:
    stacked = replace(heads, size=3 * heads.size, num_groups=3)
    if not config.qkv_bias:
        biases = {}
    elif config.position == "rope":
        biases = {"attn.q_bias": Cut((heads,)), "attn.v_bias": Cut((heads,))}
    else:
        biases = {"attn.qkv.bias": Cut((stacked,))}
    return {
        "attn.qkv.weight": Cut((stacked, channels), fan_in=1),
        **biases,
        "attn.proj.weight": Cut((channels, heads), fan_in=1),
        "attn.proj.bias": Cut((channels,)),
    }


def _mlp_cuts(config: ViTConfig, channels: Axis, hidden: Axis) -> dict[str, Cut]:
    first = {
        "gelu": {"fc1": hidden},
        "swiglu_packed": {"fc1": replace(hidden, size=2 * hidden.size, num_groups=2)},
        "swiglu": {"fc1_g": hidden, "fc1_x": hidden},
    }[config.mlp]
    cuts = {}
    for name, outputs in first.items():
        cuts[f"mlp.{name}.weight"] = Cut((outputs, channels), fan_in=1)
        cuts[f"mlp.{name}.bias"] = Cut((outputs,))
    return {**cuts, "mlp.fc2.weight": Cut((channels, hidden), fan_in=1), "mlp.fc2.bias": Cut((channels,))}


def hidden_channels(config: ViTConfig, width: int) -> int:
    """Hidden channels of a block's MLP in a sub-network of that width."""
    return block_cuts(config, 0)["mlp.fc2.weight"].shape(width)[1]


def mlp_ratio_of(hidden: int, width: int) -> float:
    """The ratio from which timm computes exactly that many hidden channels, as ⌊width · ratio⌋."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def vit_layout(config: ViTConfig) -> Layout:
    """The table of that super-network."""
    width = config.widths[-1]
    depth = config.depths[-1]
    channels = elastic(width, width, "stream")
    patch = fixed(config.patch_size)
    num_prefix = 1 + config.num_reg_tokens
    num_positions = num_patches(config) + (0 if config.no_embed_class else num_prefix)
    registers = {"reg_token": Cut((fixed(1), fixed(config.num_reg_tokens), channels))}
    positions = {"pos_embed": Cut((fixed(1), fixed(num_positions), channels))}
    blocks = {f"blocks.{i}.{name}": cut for i in range(depth) for name, cut in block_cuts(config, i).items()}
    return Layout(
        cuts={
            "cls_token": Cut((fixed(1), fixed(1), channels)),
            **(registers if config.num_reg_tokens else {}),
            **(positions if config.position == "learned" else {}),
            "mask_token": Cut((fixed(1), channels)),
            "patch_embed.proj.weight": Cut((channels, fixed(config.num_channels), patch, patch)),
            "patch_embed.proj.bias": Cut((channels,)),
            **blocks,
            "norm.weight": Cut((channels,)),
            "norm.bias": Cut((channels,)),
        },
        stages=(Stage("blocks", depth),),
        features=channels,
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
