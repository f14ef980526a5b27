"""The configuration of a whole pre-training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from poa.config.augment import AugmentConfig, MaskConfig
from poa.config.checks import require, require_non_negative, require_positive
from poa.config.data import DataConfig
from poa.config.heads import HeadsConfig
from poa.config.init import InitConfig
from poa.config.model import ModelConfig
from poa.config.objective import ObjectiveConfig
from poa.config.optim import OptimConfig
from poa.config.parallel import ParallelConfig
from poa.config.vit import ViTConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what batches, and when to write."""

    epochs: float = 100.0
    """Passes over the images."""
    batch_size: int = 64
    """Images per optimiser step, those of all micro-batches and processes together."""
    seed: int = 0
    """Seed of everything random."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end and when the run is stopped."""
    keep_checkpoints: int = 2
    """The newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none."""
    log_every: int = 10
    """Steps between two lines in the metrics."""
    draws: Literal["cost-bucket", "independent", "shared"] = "cost-bucket"
    """Which sub-networks several processes train in a step: different ones of nearly equal cost, any, or all the same.
    A single process trains one at a time either way."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient was not finite."""

    def __post_init__(self) -> None:
        require_positive("train.epochs", self.epochs)
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "2 or more (KoLeo compares neighbours)")
        require_non_negative("train.seed", self.seed)
        for name in ("checkpoint_every", "keep_checkpoints", "log_every", "max_skipped_steps"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        require_non_negative("train.keep_every", self.keep_every)


@dataclass(frozen=True)
class MonitorConfig:
    """A look at the smallest, the middle and the largest sub-network while training."""

    every: int = 1000
    """Steps between two looks; 0 never looks. One more is taken at the end."""
    num_images: int = 2000
    """Images of the training source that a look uses; a fifth of them are the k-NN queries."""
    collapse_rank: float = 2.0
    """Warn when the effective rank (RankMe) of a sub-network's features falls below this."""

    def __post_init__(self) -> None:
        require_non_negative("monitor.every", self.every)
        require(self.num_images >= 20, "monitor.num_images", self.num_images, "20 or more")
        require(self.collapse_rank >= 1.0, "monitor.collapse_rank", self.collapse_rank, "1 or more")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where it runs. None of these changes what is computed, beyond rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, else MPS, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """bfloat16: matrix products only (autocast); weights, gradients, their sums over processes, the optimiser and the
    teacher stay float32. float64: everything, for comparisons. auto: bfloat16 on CUDA, float32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block with torch.compile; auto: on CUDA only."""
    num_workers: int = -1
    """Processes that read and augment images; 0 does it in the training process, -1 chooses."""
    num_threads: int = 0
    """Threads of the training process on the CPU; 0 leaves torch's choice."""
    checkpoint_activations: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""
    watchdog_minutes: float = 30.0
    """A process without progress for this long writes where it hangs and ends, so that torchrun starts the run again;
    0 waits for ever."""

    def __post_init__(self) -> None:
        require(self.num_workers >= -1, "runtime.num_workers", self.num_workers, "-1 (automatic), 0 or more")
        require_non_negative("runtime.num_threads", self.num_threads)
        require_non_negative("runtime.watchdog_minutes", self.watchdog_minutes)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that a pre-training run is made from."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ViTConfig)
    init: InitConfig = field(default_factory=InitConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        multiple = self.model.crop_multiple
        local = self.augment.local_size
        if self.augment.num_local_crops and local % multiple:
            nearest = max(multiple, round(local / multiple) * multiple)
            expected = f"a multiple of model.patch_size {multiple}, for example {nearest}"
            require(False, "augment.local_size", local, expected)
        channels = self.model.num_channels
        require(
            len(self.augment.mean) in (1, channels),
            "augment.mean and augment.std",
            self.augment.mean,
            f"of length 1 or model.num_channels {channels}",
        )
        require(
            self.train.batch_size % self.optim.accumulate == 0 and self.train.batch_size // self.optim.accumulate >= 2,
            "optim.accumulate",
            self.optim.accumulate,
            f"a divisor of train.batch_size {self.train.batch_size} that leaves micro-batches of 2 or more",
        )
