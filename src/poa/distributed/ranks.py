"""Which process this is among those that train together, as `torchrun` tells it by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import distributed as dist

from poa.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train together."""

    rank: int = 0
    """Its number among all."""
    num_ranks: int = 1
    """All processes."""
    local_rank: int = 0
    """Its number among those of this machine; that of its GPU too."""
    num_local_ranks: int = 1
    """Processes of this machine."""

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and reports."""
        return self.rank == 0

    def part(self, size: int) -> slice:
        """Its part of `size` things in order, a multiple of the number of processes."""
        each = size // self.num_ranks
        return slice(self.rank * each, (self.rank + 1) * each)


ONE = Ranks()
"""A single process."""


def ranks_of_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The place that `torchrun` gave this process; `ONE` where it was started alone.

    Raises:
        ConfigError: the environment has a part of torchrun's variables, or they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        return ONE
    try:
        rank, num_ranks, local_rank, num_local = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"several processes need {', '.join(names)} in the environment, whole numbers; got {error}. Start them "
            "with torchrun: torchrun --nproc-per-node 2 -m poa pretrain …"
        ) from error
    if not (0 <= rank < num_ranks and 0 <= local_rank < num_local <= num_ranks):
        raise ConfigError(
            f"RANK {rank} of WORLD_SIZE {num_ranks} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {num_local} "
            "contradict each other. Start the processes with torchrun."
        )
    return Ranks(rank, num_ranks, local_rank, num_local)


def is_started() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
