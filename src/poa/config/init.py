"""Configuration of where the weights start from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from poa.config.checks import require, require_non_negative


@dataclass(frozen=True)
class InitConfig:
    """Start from public weights instead of from noise."""

    source: Annotated[str, tyro.conf.arg(aliases=("--init",))] = ""
    """timm:NAME, a directory in timm's format, a family of poa, or a .safetensors file with timm's names; empty starts
    from noise. The intact network is then that network (for a file: the one that the model options describe)."""
    reorder: bool = True
    """Before training, put the channels that matter most first, so that narrow sub-networks begin with them. This
    changes nothing in what the intact network computes, except for the order of its features."""
    num_images: int = 256
    """Images of the training data that say which channels matter."""
    freeze_epochs: float = 1.0
    """Epochs at the beginning in which only the fresh projection heads learn."""

    def __post_init__(self) -> None:
        require(self.num_images >= 1, "init.num_images", self.num_images, "1 or more")
        require_non_negative("init.freeze_epochs", self.freeze_epochs)
        for field in () if self.source else fields(self):
            value = getattr(self, field.name)
            require(value == field.default, f"init.{field.name}", value, "left alone without init.source")
