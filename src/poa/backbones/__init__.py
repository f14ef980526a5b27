"""The elastic backbones, by name in `registry`."""

from poa.backbones.registry import ARCHITECTURES, Architecture, architecture

__all__ = ["ARCHITECTURES", "Architecture", "architecture"]
