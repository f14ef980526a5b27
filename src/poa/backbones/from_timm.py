"""From a timm network to the configuration of the super-network whose intact network it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from poa.backbones.vit_timm import config_from_timm as vit_config
from poa.config import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig
from poa.errors import ConfigError


def config_from_timm(model: nn.Module) -> ModelConfig:
    """The configuration of a space whose only member is that network; the model may be on the meta device.

    Raises:
        ConfigError: poa has no architecture of that class, or the network has parts that poa's has not.
    """
    readers: dict[str, Callable[[Any], ModelConfig]] = {
        "VisionTransformer": vit_config,
        "Eva": vit_config,
        "SwinTransformer": swin_config,
        "ResNet": resnet_config,
        "ConvNeXt": convnext_config,
    }
    name = type(model).__name__
    if name not in readers:
        raise ConfigError(f"poa cannot start from timm's {name}; it can from {', '.join(readers)}.")
    return readers[name](model)


def swin_config(model: Any) -> SwinConfig:  # noqa: ANN401 (timm's classes are untyped)
    """The configuration of timm's SwinTransformer.

    Raises:
        ConfigError: head sizes, windows or MLP ratios differ between its stages, or it is not as wide as Swin is.
    """
    stages = list(model.layers)
    blocks = [block for stage in stages for block in stage.blocks]
    head_dims = {block.dim // block.attn.num_heads for block in blocks}
    windows = {window for pair in model._ref_window_sizes for window in pair}
    ratios = {block.mlp.fc1.out_features / block.dim for block in blocks}
    width = int(model.embed_dim)
    _require(
        "SwinTransformer",
        {
            "it has not four stages": len(stages) != 4,
            "its width does not double from stage to stage": [s.blocks[0].dim for s in stages]
            != [width * 2**index for index in range(4)],
            "its head sizes differ": len(head_dims) != 1,
            "its windows differ or are not square": len(windows) != 1,
            "its MLP ratios differ or are not whole": len(ratios) != 1 or min(ratios) % 1 != 0,
            "its q, k and v have no bias": blocks[0].attn.qkv.bias is None,
        },
    )
    depths = [len(stage.blocks) for stage in stages]
    return SwinConfig(
        widths=(width,),
        depths=(depths[2],),
        other_depths=(depths[0], depths[1], depths[3]),
        head_dim=head_dims.pop(),
        window_size=windows.pop(),
        patch_size=model.patch_embed.patch_size[0],
        image_size=model.patch_embed.img_size[0],
        num_channels=model.patch_embed.proj.in_channels,
        mlp_ratio=int(ratios.pop()),
        always_partition=bool(blocks[0].always_partition),
    )


def resnet_config(model: Any) -> ResNetConfig:  # noqa: ANN401 (timm's classes are untyped)
    """The configuration of timm's ResNet.

    Raises:
        ConfigError: it is not a plain bottleneck ResNet with GroupNorm.
    """
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    first = stages[0][0]
    names = {type(part).__name__ for part in model.modules()}
    _require(
        "ResNet",
        {
            "it has BatchNorm, poa's has GroupNorm (timm's resnet50_gn)": "BatchNorm2d" in names,
            "its blocks are no bottlenecks": not hasattr(first, "conv3"),
            "its stem is not one 7×7 convolution": not isinstance(model.conv1, nn.Conv2d),
            "its bottlenecks are grouped (ResNeXt)": first.conv2.groups != 1,
            "it has attention or anti-aliasing": getattr(first, "se", None) is not None
            or not isinstance(first.aa, nn.Identity | None),
            "its shortcuts are pooled": any(isinstance(part, nn.AvgPool2d) for part in model.modules()),
        },
    )
    depths = [len(stage) for stage in stages]
    base = first.conv3.out_channels // 4
    return ResNetConfig(
        widths=(first.conv2.out_channels,),
        stage2_depths=(depths[1],),
        stage3_depths=(depths[2],),
        outer_depths=(depths[0], depths[3]),
        base_channels=base,
        stem_channels=model.conv1.out_channels,
        num_groups=model.bn1.num_groups,
        num_channels=model.conv1.in_channels,
    )


def convnext_config(model: Any) -> ConvNeXtConfig:  # noqa: ANN401 (timm's classes are untyped)
    """The configuration of timm's ConvNeXt.

    Raises:
        ConfigError: it is a ConvNeXt V2, or otherwise not the first one's design.
    """
    stages = list(model.stages)
    first = stages[0].blocks[0]
    dims = [stage.blocks[0].conv_dw.out_channels for stage in stages]
    stem = model.stem[0]
    _require(
        "ConvNeXt",
        {
            "its width does not double from stage to stage": dims != [dims[0] * 2**index for index in range(4)],
            "it is a ConvNeXt V2 (global response norm)": hasattr(first.mlp, "grn"),
            "its stem overlaps": stem.kernel_size != stem.stride,
            "its patches are not of 4 or 1 pixels": stem.kernel_size not in ((4, 4), (1, 1)),
            "its MLP ratio is not 4": first.mlp.fc1.weight.shape[0] != 4 * dims[0],
            "its kernels are not 7×7": first.conv_dw.kernel_size != (7, 7),
            "its convolutions have no bias": first.conv_dw.bias is None,
            "it has no LayerScale": first.gamma is None,
            "its norm comes before the pooling": not isinstance(model.norm_pre, nn.Identity),
        },
    )
    depths = [len(stage.blocks) for stage in stages]
    return ConvNeXtConfig(
        widths=(dims[0],),
        depths=(depths[2],),
        other_depths=(depths[0], depths[1], depths[3]),
        patch_size=stem.kernel_size[0],
        num_channels=stem.in_channels,
    )


def _require(kind: str, faults: Mapping[str, bool]) -> None:
    found = [text for text, is_so in faults.items() if is_so]
    if found:
        raise ConfigError(f"poa cannot start from this {kind}: {'; '.join(found)}.")
