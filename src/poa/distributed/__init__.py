"""Several processes that train one run: who is who, and what they tell each other. One process is the simple case."""

from poa.distributed.collectives import (
    agreed,
    all_sum,
    gathered_rows,
    gathered_values,
    logsumexp_over_ranks,
    lost_processes_told,
    own_row_offset,
)
from poa.distributed.meeting import process_group
from poa.distributed.ranks import ONE, Ranks, is_started, ranks_of_environment
from poa.distributed.tensors import own_part, whole

__all__ = [
    "ONE",
    "Ranks",
    "agreed",
    "all_sum",
    "gathered_rows",
    "gathered_values",
    "is_started",
    "logsumexp_over_ranks",
    "lost_processes_told",
    "own_part",
    "own_row_offset",
    "process_group",
    "ranks_of_environment",
    "whole",
]
