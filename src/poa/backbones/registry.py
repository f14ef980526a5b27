"""The architectures that poa knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poa.backbones.convnext_layout import convnext_flops, convnext_layout, convnext_space
from poa.backbones.resnet_layout import resnet_flops, resnet_layout, resnet_space
from poa.backbones.swin_layout import swin_flops, swin_layout, swin_space
from poa.backbones.vit_layout import vit_flops, vit_layout, vit_space
from poa.config import ConvNeXtConfig, ResNetConfig, SwinConfig, ViTConfig
from poa.elastic import Layout, SearchSpace, Subnet
from poa.errors import ConfigError

if TYPE_CHECKING:
    from poa.backbones.base import Backbone


@dataclass(frozen=True)
class Architecture:
    """An elastic architecture: what can be known of it without torch, and how to build it.

    Attributes:
        name: as written in a family's JSON.
        config: its configuration's class.
        space: the search space of a configuration.
        layout: the table of a configuration.
        flops: (configuration, sub-network, image size) → operations of one forward pass on one image.
        build: makes the super-network of a configuration, weights not yet drawn.
    """

    name: str
    config: type[Any]
    space: Callable[[Any], SearchSpace]
    layout: Callable[[Any], Layout]
    flops: Callable[[Any, Subnet, int | None], int]
    build: Callable[[Any], Backbone]


def _build_vit(config: ViTConfig) -> Backbone:
    from poa.backbones.vit import ElasticViT

    return ElasticViT(config)


def _build_resnet(config: ResNetConfig) -> Backbone:
    from poa.backbones.resnet import ElasticResNet

    return ElasticResNet(config)


def _build_swin(config: SwinConfig) -> Backbone:
    from poa.backbones.swin import ElasticSwin

    return ElasticSwin(config)


def _build_convnext(config: ConvNeXtConfig) -> Backbone:
    from poa.backbones.convnext import ElasticConvNeXt

    return ElasticConvNeXt(config)


ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture("vit", ViTConfig, vit_space, vit_layout, vit_flops, _build_vit),
    "swin": Architecture("swin", SwinConfig, swin_space, swin_layout, swin_flops, _build_swin),
    "resnet": Architecture("resnet", ResNetConfig, resnet_space, resnet_layout, resnet_flops, _build_resnet),
    "convnext": Architecture(
        "convnext", ConvNeXtConfig, convnext_space, convnext_layout, convnext_flops, _build_convnext
    ),
}


def architecture(config_or_name: object) -> Architecture:
    """The architecture of that name, or of that configuration.

    Raises:
        ConfigError: there is none; those that there are are named.
    """
    for entry in ARCHITECTURES.values():
        if config_or_name == entry.name or type(config_or_name) is entry.config:
            return entry
    raise ConfigError(f"there is no architecture {config_or_name!r}. Architectures: {', '.join(ARCHITECTURES)}.")
