"""The architectures that poa knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poa.backbones.vit_layout import vit_flops, vit_layout, vit_space
from poa.config import ViTConfig
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


ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture("vit", ViTConfig, vit_space, vit_layout, vit_flops, _build_vit),
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
