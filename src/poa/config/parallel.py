"""Configuration of how several processes share a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poa.config.checks import require, require_non_negative


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work. None of it changes what is computed, beyond rounding.

    A single process has nothing to share.
    """

    mode: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every process has the whole model. fsdp: weights, optimiser and teacher are divided among the processes
    (FSDP2). auto: ddp."""
    shard_size: int = 0
    """With fsdp, the processes among which the model is divided; groups of that many hold a copy each (HSDP). A divisor
    of the number of processes, best those of one machine; 0 divides it among all."""

    def __post_init__(self) -> None:
        require_non_negative("parallel.shard_size", self.shard_size)
        require(self.mode == "fsdp" or not self.shard_size, "parallel.shard_size", self.shard_size, "0 without fsdp")
