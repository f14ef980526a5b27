"""The table of an elastic ResNet: shapes, cuts, search space and cost. No torch here."""

from __future__ import annotations

import math

from poa.config import ResNetConfig
from poa.elastic import Cut, Layout, SearchSpace, Stage, Subnet, elastic, fixed


def resnet_space(config: ResNetConfig) -> SearchSpace:
    """The search space of that super-network; the depths are those of stages 2 and 3."""
    return SearchSpace(config.widths, (config.stage2_depths, config.stage3_depths), 1.0, config.draw_emphasis)


def stage_depths(config: ResNetConfig, subnet: Subnet) -> tuple[int, int, int, int]:
    """The blocks of all four stages."""
    first, last = config.outer_depths
    second, third = subnet.depths
    return first, second, third, last


def block_cuts(config: ResNetConfig, stage: int, block: int) -> dict[str, Cut]:
    """The parameters of one block by timm's names; `stage` counts from 0.

    Only the middle is elastic. conv1 sees all that enters the block, so only conv2 and conv3 have a factor.
    """
    planes = config.base_channels << stage
    middle = elastic(config.widths[-1] << stage, config.widths[-1])
    outputs = fixed(4 * planes)
    before = config.stem_channels if stage == 0 else 2 * planes
    inputs = fixed(before if block == 0 else 4 * planes)
    point, window = (fixed(1), fixed(1)), (fixed(3), fixed(3))
    cuts = {
        "conv1.weight": Cut((middle, inputs, *point)),
        "conv2.weight": Cut((middle, middle, *window), fan_in=1),
        "conv3.weight": Cut((outputs, middle, *point), fan_in=1),
    }
    norms = {"bn1": middle, "bn2": middle, "bn3": outputs}
    if stage_stride(stage, block) > 1 or inputs != outputs:
        cuts["downsample.0.weight"] = Cut((outputs, inputs, *point))
        norms["downsample.1"] = outputs
    return cuts | {f"{norm}.{part}": Cut((axis,)) for norm, axis in norms.items() for part in ("weight", "bias")}


def stage_stride(stage: int, block: int) -> int:
    """The stride of that block; `stage` counts from 0."""
    return 2 if stage > 0 and block == 0 else 1


def resnet_layout(config: ResNetConfig) -> Layout:
    """The table of that super-network."""
    stem = fixed(config.stem_channels)
    depths = stage_depths(config, resnet_space(config).intact)
    blocks = {
        f"layer{stage + 1}.{block}.{name}": cut
        for stage, depth in enumerate(depths)
        for block in range(depth)
        for name, cut in block_cuts(config, stage, block).items()
    }
    return Layout(
        cuts={
            "mask_token": Cut((fixed(1), stem)),
            "conv1.weight": Cut((stem, fixed(config.num_channels), fixed(7), fixed(7))),
            "bn1.weight": Cut((stem,)),
            "bn1.bias": Cut((stem,)),
            **blocks,
        },
        stages=(Stage("layer2", depths[1]), Stage("layer3", depths[2])),
        features=fixed(4 * (config.base_channels << 3)),
        training_only=frozenset({"mask_token"}),
    )


def resnet_flops(config: ResNetConfig, subnet: Subnet, image_size: int | None = None) -> int:
    """Floating-point operations of one forward pass on one image, from the table of shapes.

    Convolutions only (2 per multiply-add), as profilers count; norms, activations and pooling are left out.

    Args:
        config: the super-network.
        subnet: the sub-network.
        image_size: side in pixels; the model's own by default.
    """
    size = image_size or config.image_size
    macs = 0
    for _, target, cut in resnet_layout(config).owned(subnet):
        shape = cut.shape(subnet.width)
        if len(shape) == 4:
            side = -(-size // _stride_of(target))
            macs += side * side * math.prod(shape)
    return 2 * macs


def _stride_of(name: str) -> int:
    """Pixels of the image along a side for one place of what that convolution gives."""
    if name == "conv1.weight":
        return 2
    stage, block, layer = int(name[len("layer")]) - 1, *name.split(".")[1:3]
    before_its_stride = layer == "conv1" and stage_stride(stage, int(block)) == 2
    return 4 << stage - before_its_stride
