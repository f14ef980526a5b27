"""Schedules: values as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from poa.config import ObjectiveConfig, OptimConfig, PretrainConfig
from poa.errors import ConfigError

Schedule = Callable[[int], float]
"""The value at a step, counted from 0."""


@dataclass(frozen=True)
class WarmupCosine:
    """A linear warm-up from `start` to `peak`, both included, then a cosine to `final`.

    The cosine is made for a run of `stretch` times `num_steps` and cut at `num_steps`; from there on the value is
    `final`.
    """

    start: float
    peak: float
    final: float
    num_steps: int
    num_warmup_steps: int = 0
    stretch: float = 1.0

    def __call__(self, step: int) -> float:
        """The value at that step."""
        if step >= self.num_steps:
            return self.final
        if step < self.num_warmup_steps:
            if self.num_warmup_steps == 1:
                return self.start
            return self.start + (self.peak - self.start) * step / (self.num_warmup_steps - 1)
        length = int(self.num_steps * self.stretch + 1e-9) - self.num_warmup_steps
        phase = (step - self.num_warmup_steps) / length
        return self.final + 0.5 * (self.peak - self.final) * (1.0 + math.cos(math.pi * phase))


@dataclass(frozen=True)
class LinearWarmup:
    """From `start` to `final` in a straight line over `num_steps`, both included; `final` afterwards."""

    start: float
    final: float
    num_steps: int

    def __call__(self, step: int) -> float:
        """The value at that step."""
        if step >= self.num_steps or self.num_steps == 1:
            return self.final if step >= self.num_steps else self.start
        return self.start + (self.final - self.start) * step / (self.num_steps - 1)


class StepValues(NamedTuple):
    """What the schedules say at one step."""

    lr: float
    last_layer_lr: float
    """Of the heads' last layers: 0 while they are frozen."""
    backbone_lr: float
    """Of the backbone: 0 while it is frozen."""
    weight_decay: float
    ema_momentum: float
    teacher_temp: float
    masks: bool
    """Whether masks and patch loss are on."""


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run."""

    num_steps: int
    num_warmup_steps: int
    num_frozen_steps: int
    num_frozen_backbone_steps: int
    mask_start_step: int
    lr_schedule: Schedule
    weight_decay_schedule: Schedule
    ema_momentum_schedule: Schedule
    teacher_temp_schedule: Schedule

    def at(self, step: int) -> StepValues:
        """Every value at that step."""
        lr = self.lr_schedule(step)
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.num_frozen_steps else lr,
            backbone_lr=0.0 if step < self.num_frozen_backbone_steps else lr,
            weight_decay=self.weight_decay_schedule(step),
            ema_momentum=self.ema_momentum_schedule(step),
            teacher_temp=self.teacher_temp_schedule(step),
            masks=step >= self.mask_start_step,
        )


def scaled_lr(optim: OptimConfig, batch_size: int) -> float:
    """base_lr · √(batch size / 1024)."""
    return optim.base_lr * math.sqrt(batch_size / 1024)


def make_schedules(config: PretrainConfig, steps_per_epoch: int) -> Schedules:
    """The schedules of a run with that many steps per epoch."""
    optim, objective = config.optim, config.objective
    num_steps = num_steps_of(config.train.epochs, steps_per_epoch)
    if num_steps < 1:
        raise ConfigError(
            f"train.epochs {config.train.epochs:g} gives no step: an epoch has {steps_per_epoch}. "
            f"Choose at least {1 / steps_per_epoch:.2g}."
        )
    warmup = min(num_steps_of(optim.warmup_epochs, steps_per_epoch), num_steps)
    stretch = optim.schedule_stretch
    peak = scaled_lr(optim, config.train.batch_size)
    decay = (optim.weight_decay, optim.weight_decay, optim.final_weight_decay)
    momentum = (optim.ema_momentum, optim.ema_momentum, optim.final_ema_momentum)
    return Schedules(
        num_steps=num_steps,
        num_warmup_steps=warmup,
        num_frozen_steps=num_steps_of(optim.freeze_last_layer_epochs, steps_per_epoch),
        num_frozen_backbone_steps=(
            num_steps_of(config.init.freeze_epochs, steps_per_epoch) if config.init.source else 0
        ),
        mask_start_step=_mask_start_step(objective, num_steps, steps_per_epoch),
        lr_schedule=WarmupCosine(0.0, peak, optim.final_lr, num_steps, warmup, stretch),
        weight_decay_schedule=WarmupCosine(*decay, num_steps, 0, stretch),
        ema_momentum_schedule=WarmupCosine(*momentum, num_steps, 0, stretch),
        teacher_temp_schedule=LinearWarmup(
            objective.teacher_temp_start,
            objective.teacher_temp,
            num_steps_of(objective.teacher_temp_warmup_epochs, steps_per_epoch),
        ),
    )


def num_steps_of(epochs: float, steps_per_epoch: int) -> int:
    """The number of steps in that many epochs, rounded."""
    return round(epochs * steps_per_epoch)


def _mask_start_step(objective: ObjectiveConfig, num_steps: int, steps_per_epoch: int) -> int:
    if objective.patch_weight == 0.0:
        return num_steps
    return num_steps_of(objective.patch_start_epoch, steps_per_epoch)
