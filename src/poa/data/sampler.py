"""Which images a micro-batch holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from poa.errors import ConfigError
from poa.randomness import generator


@dataclass(frozen=True)
class EpochPlan:
    """The order of the images over a whole run: each epoch a permutation, cut into consecutive steps.

    Images that do not fill an epoch's last step are left out in that epoch.

    Attributes:
        num_images: images of the source.
        batch_size: images of an optimiser step.
        accumulate: micro-batches of an optimiser step, a divisor of the batch size.
        seed: the seed of the run.
    """

    num_images: int
    batch_size: int
    accumulate: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.num_images or self.batch_size < 1:
            raise ConfigError(
                f"train.batch_size must be between 1 and the number of images, {self.num_images}; got "
                f"{self.batch_size}. Largest valid: --train.batch-size {self.num_images}."
            )
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigError(
                f"optim.accumulate must be a divisor of train.batch_size {self.batch_size}; got "
                f"{self.accumulate}. Nearest: --optim.accumulate "
                f"{_nearest_divisor(self.batch_size, self.accumulate)}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch, 1 or more."""
        return self.num_images // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch."""
        return self.batch_size // self.accumulate

    def position(self, micro_step: int) -> tuple[int, Int64[np.ndarray, " images"]]:
        """The epoch and the images of a micro-batch; a pure function of the plan and `micro_step`.

        Args:
            micro_step: s · accumulate + m for micro-batch m of optimiser step s, both counted from 0.

        Raises:
            IndexError: `micro_step` is negative.
        """
        if micro_step < 0:
            raise IndexError(f"micro-batches are counted from 0; got {micro_step}")
        step, part = divmod(micro_step, self.accumulate)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size + part * self.micro_batch_size
        order = _order(self.num_images, self.seed, epoch)
        return epoch, order[start : start + self.micro_batch_size].copy()


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " images"]:
    return generator(seed, "order", epoch).permutation(num_images)


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))
