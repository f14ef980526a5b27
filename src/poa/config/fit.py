"""Configuration of training on labels: fine-tuning, segmentation, detection."""

from __future__ import annotations

from dataclasses import dataclass

from poa.config.checks import require, require_non_negative, require_positive, require_probability


@dataclass(frozen=True)
class FitConfig:
    """AdamW with layer-wise decay, a cosine with warm-up, a moving average of the weights."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Learning rate of the head and, times the layer-wise decay, of the backbone."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Weight decay; none on biases, norms, tokens and position embeddings."""
    warmup_epochs: float = 5.0
    """Epochs of the linear warm-up from 0."""
    layer_decay: float = 0.75
    """Each block's learning rate over that of the block above it."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0 leaves them as they are."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated and kept; 0: none."""
    freeze: bool = False
    """Leave the backbone's weights as they are and train the head only."""
    evaluate_every: int = 1
    """Epochs from one evaluation to the next; the last epoch is evaluated in any case."""
    patience: int = 0
    """Stop when this many epochs in a row brought no better figure; 0: never."""
    seed: int = 0
    """Of fresh weights, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            require(getattr(self, name) >= 1, f"fit.{name}", getattr(self, name), "1 or more")
        for name in ("lr", "layer_decay"):
            require_positive(f"fit.{name}", getattr(self, name))
        for name in ("min_lr", "weight_decay", "warmup_epochs", "clip_grad"):
            require_non_negative(f"fit.{name}", getattr(self, name))
        require_probability("fit.ema_decay", self.ema_decay)
        require(self.min_lr <= self.lr, "fit.min_lr", self.min_lr, f"at most fit.lr = {self.lr:g}")
        require(self.patience >= 0, "fit.patience", self.patience, "0 or more")
        require(self.seed >= 0, "fit.seed", self.seed, "0 or more")
