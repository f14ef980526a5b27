"""The configurations of the architectures, told apart by their field `architecture`."""

from __future__ import annotations

from poa.config.convnext import ConvNeXtConfig
from poa.config.resnet import ResNetConfig
from poa.config.swin import SwinConfig
from poa.config.vit import ViTConfig

ModelConfig = ViTConfig | ResNetConfig | SwinConfig | ConvNeXtConfig
"""Any of them. All have `architecture`, `widths`, `image_size`, `num_channels`, `mask_side`, `crop_multiple` and
`require_image_size`."""

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "vit": ViTConfig,
    "swin": SwinConfig,
    "resnet": ResNetConfig,
    "convnext": ConvNeXtConfig,
}
"""Each architecture's configuration by its name."""
