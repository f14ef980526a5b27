"""The smallest configuration of every registered architecture."""

from poa.config import ConvNeXtConfig, ResNetConfig, SwinConfig, ViTConfig

SMALLEST = {
    "vit": ViTConfig(
        widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=16, num_channels=2, drop_path=0.4
    ),
    "swin": SwinConfig(
        widths=(8, 16),
        depths=(2, 3, 5),
        other_depths=(2, 1, 2),
        head_dim=4,
        window_size=4,
        patch_size=2,
        image_size=32,
        num_channels=2,
        drop_path=0.4,
    ),
    "resnet": ResNetConfig(
        widths=(32, 64),
        stage2_depths=(1, 2),
        stage3_depths=(1, 3),
        outer_depths=(1, 1),
        base_channels=8,
        image_size=32,
        num_channels=2,
    ),
    "convnext": ConvNeXtConfig(
        widths=(4, 8), depths=(1, 3), other_depths=(1, 1, 2), image_size=32, num_channels=2, drop_path=0.4
    ),
}

IN_COLOUR = {
    "vit": ViTConfig(widths=(16, 32), depths=(1, 2), head_dim=8, patch_size=4, image_size=32),
    "swin": SwinConfig(
        widths=(8, 16), depths=(1, 2), other_depths=(1, 1, 1), head_dim=4, window_size=4, patch_size=2, image_size=32
    ),
    "resnet": ResNetConfig(
        widths=(32, 64), stage2_depths=(1, 2), stage3_depths=(1, 2), outer_depths=(1, 1), base_channels=8, image_size=32
    ),
    "convnext": ConvNeXtConfig(widths=(4, 8), depths=(1, 2), other_depths=(1, 1, 1), image_size=32),
}
"""As small, for colour images of 32 pixels."""
