"""Configuration of the optimiser, its schedules and the teacher's moving average."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config.checks import require, require_non_negative, require_positive, require_probability


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedules, and the exponential moving average that is the teacher."""

    base_lr: float = 4e-3
    """Learning rate at a batch of 1024; the one used is base_lr · √(batch size / 1024)."""
    final_lr: float = 2e-5
    """Learning rate at the end of the cosine (not scaled by the batch)."""
    warmup_epochs: float = 10.0
    """Epochs of the linear warm-up from 0."""
    schedule_stretch: float = 1.0
    """The cosines are made for this many times the run's length and cut at its end (1: they reach their end)."""
    weight_decay: float = 0.04
    """Weight decay at the beginning; none on biases, norms and LayerScale."""
    final_weight_decay: float = 0.4
    """Weight decay at the end of the cosine."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.999
    """AdamW's second decay rate."""
    layer_decay: float = 0.9
    """Each block's learning rate over that of the block above it."""
    patch_embed_lr_scale: float = 0.2
    """Further factor on the learning rate of the patch embedding (ConvNeXt's stem; a ResNet has none)."""
    freeze_last_layer_epochs: float = 1.0
    """Epochs in which the heads' last layers do not move."""
    clip_grad: float = 1.5
    """Largest gradient norm, of the backbone and of the heads, each; 0 leaves gradients as they are."""
    accumulate: int = 1
    """Micro-batches per step. Each has its own targets and draws its own sub-network, as a process would."""
    ema_momentum: float = 0.992
    """The teacher's momentum at the beginning."""
    final_ema_momentum: float = 0.9999
    """The teacher's momentum at the end of the cosine."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "schedule_stretch", "layer_decay"):
            require_positive(f"optim.{name}", getattr(self, name))
        for name in (
            "final_lr",
            "warmup_epochs",
            "weight_decay",
            "final_weight_decay",
            "patch_embed_lr_scale",
            "freeze_last_layer_epochs",
            "clip_grad",
        ):
            require_non_negative(f"optim.{name}", getattr(self, name))
        require(self.schedule_stretch >= 1.0, "optim.schedule_stretch", self.schedule_stretch, "1 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"optim.{name}", value, "0 or more and less than 1")
        for name in ("ema_momentum", "final_ema_momentum"):
            require_probability(f"optim.{name}", getattr(self, name))
        require(self.accumulate >= 1, "optim.accumulate", self.accumulate, "1 or more")
