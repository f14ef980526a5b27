import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed as dist

from poa.distributed import Ranks, meeting
from poa.distributed.meeting import meet

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def kept_store(monkeypatch):
    """A store that outlives its processes, as torchrun's does; each rank has a connection of its own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(
        meeting,
        "rendezvous",
        lambda *_, **__: iter([(dist.TCPStore("127.0.0.1", server.port, is_master=False), 0, 0)]),
    )
    return server


def start(order, timeout=TIMEOUT):
    """The ranks of three processes begin in that order, each only when the one before has; their stores by rank."""
    with ThreadPoolExecutor(3) as pool:
        found = {}
        for rank in order:
            found[rank] = pool.submit(meet, Ranks(rank, 3, rank, 3), timeout)
            threading.Event().wait(0.1)
        return {rank: future.result() for rank, future in found.items()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_processes_that_are_started_again_share_a_store_without_what_earlier_ones_left(kept_store, order):
    for attempt in range(3):
        stores = start(order)
        assert not any(store.check(["address"]) for store in stores.values())
        stores[1].set("address", str(attempt))
        assert {store.get("address") for store in stores.values()} == {str(attempt).encode()}


@pytest.mark.parametrize("gone", [0, 1])
def test_a_start_in_which_a_process_never_came_does_not_disturb_the_next(kept_store, gone):
    others = [rank for rank in (0, 1, 2) if rank != gone]
    with pytest.raises(RuntimeError):
        start(others, timedelta(seconds=0.5))
    stores = start((2, 1, 0))
    stores[0].set("address", "new")
    assert stores[2].get("address") == b"new"
