"""Shards of a source that is read in order, fetched before their turn comes."""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from poa.data.base import ImageSource
from poa.data.shards import CachedShard, ShardSource
from poa.data.shards.fetch import Stop


class Ahead:
    """While it is open, threads fetch the shards behind the one that is read, `data.downloads` at most at a time.

    No more than the cache has room for, and nothing of sources that need no fetching. What cannot be fetched is left to
    the reading of it, which tries again and raises.

    Args:
        source: is read in order.
    """

    def __init__(self, source: ImageSource) -> None:
        self._shards: list[CachedShard] = []
        if isinstance(source, ShardSource) and source.is_cached:
            sizes = np.asarray(source.block_sizes)
            firsts = (np.cumsum(sizes) - sizes)[sizes > 0]
            self._source, self._firsts = source, firsts.tolist()
            self._shards = source.shards_of(firsts)
            # Besides, there is one that is read and one that is begun.
            room = source.cache.limit // max(shard.space for shard in self._shards) - 2
            self._pool = ThreadPoolExecutor(source.config.downloads, thread_name_prefix="poa-ahead")
            self._num_ahead = max(0, min(source.config.downloads, room))
        self._next = 0
        self._stop = Stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._shards:
            self._pool.shutdown(cancel_futures=True)

    def reached(self, index: int) -> None:
        """Tells that this image has been read. Threads start at the first call: not before worker processes do."""
        if not self._shards:
            return
        end = bisect_right(self._firsts, index) + self._num_ahead
        for shard in self._shards[self._next : end]:
            self._pool.submit(self._source.cache.ensure, shard, self._stop)
        self._next = max(self._next, end)
