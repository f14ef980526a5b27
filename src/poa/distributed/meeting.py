"""How processes find each other; those that were started again find each other, and not those that they replace."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from poa.distributed.ranks import Ranks
from poa.errors import ConfigError

START_UP_TIME = timedelta(minutes=30)
"""How long a process waits for the others."""

_POLL_SECONDS = 0.05


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Within, the processes of `ranks` can talk to each other; a single one has nothing to start.

    Tensors on CUDA devices travel by NCCL, those on the CPU by gloo.

    Raises:
        ConfigError: the processes do not find each other.
    """
    if ranks.num_ranks == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    try:
        store = meet(ranks, START_UP_TIME)
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.num_ranks, timeout=START_UP_TIME, device_id=own
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {ranks.rank} of {ranks.num_ranks} does not find the others: {error}. Look at MASTER_ADDR, "
            "MASTER_PORT and the network between the machines."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet(ranks: Ranks, timeout: timedelta) -> Store:
    """A store that the processes of this start share, without what those of earlier starts left in it.

    torchrun keeps one store for all its restarts, with the addresses of the processes that died in it; a process that
    reads such an address before the new one is there does not find the others (pytorch/pytorch#135712). So the main
    process chooses a name nobody had before, and the others take it only when it has answered to theirs.

    Raises:
        RuntimeError: they do not find each other in time.
    """
    store, _, _ = next(rendezvous("env://", ranks.rank, ranks.num_ranks, timeout=timeout))
    store.set_timeout(timeout)
    if ranks.is_main:
        return PrefixStore(_invite(store, ranks.num_ranks), store)
    return PrefixStore(_accept(store, ranks.rank, timeout), store)


def _invite(store: Store, num_ranks: int) -> str:
    start = uuid.uuid4().hex
    store.set("poa/start", start)
    for rank in range(1, num_ranks):
        guest = store.get(f"{start}/guest-{rank}").decode()  # waits for it
        store.set(f"{start}/welcome-{guest}", "")
    return start


def _accept(store: Store, rank: int, timeout: timedelta) -> str:
    guest, start = uuid.uuid4().hex, ""
    deadline = time.monotonic() + timeout.total_seconds()
    while not (start and store.check([f"{start}/welcome-{guest}"])):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the main process did not answer within {timeout}")
        if (newest := store.get("poa/start").decode()) != start:
            start = newest
            store.set(f"{start}/guest-{rank}", guest)
        time.sleep(_POLL_SECONDS)
    return start
