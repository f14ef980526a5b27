"""How processes that were started again find each other, and not those that they replace."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from poa.distributed.ranks import Ranks

_POLL_SECONDS = 0.05


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
