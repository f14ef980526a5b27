"""Which images a micro-batch holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from poa.config import PretrainConfig
from poa.data.base import ImageSource
from poa.data.windows import WindowedOrder
from poa.distributed.ranks import ONE, Ranks
from poa.errors import ConfigError
from poa.randomness import generator

_LEAST_BLOCKS = 4


@dataclass(frozen=True)
class EpochPlan:
    """The order of the images over a whole run: each epoch a permutation, cut into consecutive steps.

    Images that do not fill an epoch's last step are left out in that epoch.

    Attributes:
        num_images: images of the source.
        batch_size: images of an optimiser step.
        accumulate: micro-batches of an optimiser step, a divisor of the batch size.
        seed: the seed of the run.
        ranks: the processes that share every micro-batch: each takes its part of the images. The order of the images
            does not depend on their number.
        windows: the order of images in shards, in which only a few shards are needed at a time; without, the order is
            drawn uniformly from all.
    """

    num_images: int
    batch_size: int
    accumulate: int
    seed: int
    ranks: Ranks = ONE
    windows: WindowedOrder | None = None

    @classmethod
    def of(cls, source: ImageSource, config: PretrainConfig, ranks: Ranks = ONE) -> EpochPlan:
        """The plan of a run.

        Raises:
            ConfigError: batch size, micro-batches, processes, images and lanes do not fit together.
        """
        windows = None
        if source.block_sizes is not None:
            windows = WindowedOrder(source.block_sizes, config.data.window, config.data.lanes, config.train.seed)
        return cls(len(source), config.train.batch_size, config.optim.accumulate, config.train.seed, ranks, windows)

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
        unit = self.accumulate * self.ranks.num_ranks
        if self.batch_size % unit or (self.ranks.num_ranks > 1 and self.batch_size < 2 * unit):
            nearest = max(2 * unit, round(self.batch_size / unit) * unit)
            raise ConfigError(
                f"train.batch_size must be a multiple, at least twice, of the {self.ranks.num_ranks} processes times "
                f"optim.accumulate {self.accumulate}; got {self.batch_size}. Nearest: --train.batch-size {nearest} (in "
                f"a new run), or start as many processes as divide {self.micro_batch_size}."
            )
        if self.windows is not None and self.micro_batch_size % self.windows.lanes:
            nearest = _nearest_divisor(self.micro_batch_size, self.windows.lanes)
            raise ConfigError(
                f"data.lanes must be a divisor of the {self.micro_batch_size} images of a micro-batch; got "
                f"{self.windows.lanes}. Nearest: --data.lanes {nearest}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch, 1 or more."""
        return self.num_images // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch, those of all processes."""
        return self.batch_size // self.accumulate

    def position(self, micro_step: int) -> tuple[int, Int64[np.ndarray, " images"]]:
        """The epoch and the images of a micro-batch, of all processes; a pure function of the plan and `micro_step`.

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
        if self.windows is not None:
            return epoch, self.windows.take(epoch, start, self.micro_batch_size)
        order = _order(self.num_images, self.seed, epoch)
        return epoch, order[start : start + self.micro_batch_size].copy()


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " images"]:
    return generator(seed, "order", epoch).permutation(num_images)


def some_images(source: ImageSource, number: int, rng: np.random.Generator) -> Int64[np.ndarray, " images"]:
    """So many images of a source, drawn at random, in rising order; all where it has fewer.

    Where images lie in shards, few shards are drawn first: 4, or as many as hold twice the number.
    """
    if source.block_sizes is None:
        return np.sort(rng.permutation(len(source))[:number])
    sizes = source.block_sizes
    blocks = rng.permutation(np.flatnonzero(sizes))
    enough = int(np.searchsorted(np.cumsum(sizes[blocks]), 2 * number)) + 1
    starts = np.cumsum(sizes) - sizes
    chosen = [starts[block] + np.arange(sizes[block]) for block in blocks[: max(_LEAST_BLOCKS, enough)]]
    return np.sort(rng.permutation(np.concatenate(chosen))[:number])


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))
