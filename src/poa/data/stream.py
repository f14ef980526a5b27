"""The micro-batches of a run, with their shards fetched ahead and the time measured that training waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Self

from poa.data.loader import Batch, MultiCropBatches, make_loader
from poa.data.shards.prefetch import Prefetcher
from poa.data.shards.source import ShardSource


class BatchStream(Iterator[Batch]):
    """Micro-batches first … last − 1 of this process, to be used in a `with` block.

    Where the images lie in fetched shards, one process of each machine fetches those of coming micro-batches ahead.

    Args:
        batches: where they come from.
        first: the first micro-batch.
        last: one past the last.
        num_workers: as for `make_loader`.
        pin_memory: as for `make_loader`.

    Attributes:
        waited_seconds: how long `next` has taken in all: the time that data were not ready when they were wanted.

    Raises:
        DataError: the shards that are needed at the same time do not fit into the cache.
    """

    def __init__(self, batches: MultiCropBatches, first: int, last: int, num_workers: int, pin_memory: bool) -> None:
        self.waited_seconds = 0.0
        self._next = first
        self._is_stopped = False
        self._prefetcher = _prefetcher(batches, last)
        self._loader = make_loader(batches, first, last, num_workers, pin_memory)
        if self._prefetcher is not None:
            self._loader.on_start = partial(self._prefetcher.start, first)
        self._items: Iterator[Batch] = iter(())

    def __enter__(self) -> Self:
        self._items = iter(self._loader)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._items = iter(())
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: its images cannot be read.
            StopIteration: all were given, or `stop` was called.
        """
        if self._is_stopped:
            raise StopIteration
        begin = time.monotonic()
        if self._prefetcher is not None:
            self._prefetcher.reached(self._next)
        self._next += 1
        try:
            return next(self._items)
        finally:
            self.waited_seconds += time.monotonic() - begin

    def stop(self) -> None:
        """Ends the stream, a wait for downloads included; may be called by a signal's handler."""
        self._is_stopped = True
        self._loader.stop.set()


def _prefetcher(batches: MultiCropBatches, last: int) -> Prefetcher | None:
    """What fetches ahead; None where nothing is fetched, or where another process of this machine does it."""
    source, plan = batches.source, batches.plan
    if not (isinstance(source, ShardSource) and source.is_cached):
        return None
    prefetcher = Prefetcher(source, plan, last)
    return prefetcher if plan.ranks.local_rank == 0 else None
