"""Shards fetched ahead of the training."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from poa.data.sampler import EpochPlan
from poa.data.shards.cache import CachedShard
from poa.data.shards.fetch import Stop, Stopped
from poa.data.shards.source import ShardSource
from poa.errors import DataError, PoaWarning

MAX_AHEAD = 4096
"""Micro-batches that are looked ahead."""

MAX_LOST = 20
"""Shards that are wanted and gave way nevertheless, at which a warning is given."""

_LOOK_SECONDS = 0.2
_AGAIN_SECONDS = 60.0


class Prefetcher:
    """Threads of this process that fetch the shards of coming micro-batches, as far ahead as the cache has room.

    One process of a machine does it for all of them. What cannot be fetched is tried again, and a warning is given: the
    training has no need of it yet. When its time has come and it is still not there, the process that reads it raises.

    Args:
        source: the images.
        plan: which of them the micro-batches hold.
        last: one past the last micro-batch.

    Raises:
        DataError: the shards that are needed at the same time do not fit into the cache.
    """

    def __init__(self, source: ShardSource, plan: EpochPlan, last: int) -> None:
        self.source, self.last = source, last
        # What the plan remembers is its own: another thread may make batches from it.
        self.plan = replace(plan, windows=copy(plan.windows))
        self._check_room()
        self._stop = Stop()
        self._now = self._next = 0
        self._coming: deque[tuple[int, list[CachedShard]]] = deque()
        self._uses: Counter[CachedShard] = Counter()
        self._keys: set[str] = set()
        self._downloads: dict[CachedShard, Future[Path]] = {}
        self._failed: dict[CachedShard, float] = {}
        self._was_there: set[CachedShard] = set()
        self._num_lost = 0
        self._messages: deque[str] = deque()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="poa-prefetch", daemon=True)

    def start(self, micro_step: int) -> None:
        """Begins with the shards of this micro-batch. Not before the loader's processes are started."""
        self._now = self._next = micro_step
        self._thread.start()

    def reached(self, micro_step: int) -> None:
        """Tells that this micro-batch is wanted now: shards of those before it may give way."""
        self._now = micro_step
        if self._error is not None:
            raise self._error
        while self._messages:
            warnings.warn(self._messages.popleft(), PoaWarning, stacklevel=2)

    def close(self) -> None:
        """Ends the threads; downloads that are under way are given up."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _check_room(self) -> None:
        windows, ranks = self.plan.windows, self.plan.ranks
        num_shards = 1
        if windows is not None:
            lanes = -(-windows.lanes * ranks.num_local_ranks // ranks.num_ranks)
            num_shards = min(len(windows.block_sizes), 2 * windows.window * lanes)
        self.source.cache.check_room(
            self.source.room_for(num_shards), f"{num_shards} shards, those of two windows in every lane of a machine,"
        )

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(self.source.config.downloads, thread_name_prefix="poa-prefetch") as pool:
                while not self._stop.is_set():
                    self._advance()
                    self._extend()
                    for shard in list(self._uses):
                        self._fetch(shard, pool)
                    self._stop.wait(_LOOK_SECONDS)
        except BaseException as error:  # noqa: BLE001 (raised by `reached`, in the thread that can handle it)
            self._error = error

    def _advance(self) -> None:
        # Other processes may still be at an earlier micro-batch of this step.
        while self._coming and self._coming[0][0] <= self._now - self.plan.accumulate:
            for shard in self._coming.popleft()[1]:
                self._uses[shard] -= 1
                if not self._uses[shard]:
                    del self._uses[shard]
                    self._keys.discard(shard.key)
                    self._was_there.discard(shard)
                    self._downloads.pop(shard, None)
        self._next = max(self._next, self._now)

    def _extend(self) -> None:
        """Looks as far ahead as the shards fit into the cache."""
        total = sum(shard.num_bytes for shard in self._uses) + self.source.room_to_fetch
        while self._next < min(self.last, self._now + MAX_AHEAD):
            shards = self.source.shards_of(self._indices(self._next))
            total += sum(shard.num_bytes for shard in shards if shard not in self._uses)
            if total > self.source.cache.limit and self._coming:
                return
            self._uses.update(shards)
            self._keys.update(shard.key for shard in shards)
            self._coming.append((self._next, shards))
            self._next += 1

    def _indices(self, micro_step: int) -> np.ndarray:
        """The images of the micro-batch that the processes of this machine take."""
        ranks, (_, whole) = self.plan.ranks, self.plan.position(micro_step)
        each = len(whole) // ranks.num_ranks
        first = (ranks.rank - ranks.local_rank) * each
        return whole[first : first + ranks.num_local_ranks * each]

    def _fetch(self, shard: CachedShard, pool: ThreadPoolExecutor) -> None:
        """Begins to fetch a shard that is not there; one that is there counts as used, so that it stays."""
        running = self._downloads.get(shard)
        if running is not None and running.done():
            del self._downloads[shard]
            self._look_at(shard, running.exception())
            running = None
        is_due = time.monotonic() - self._failed.get(shard, -_AGAIN_SECONDS) >= _AGAIN_SECONDS
        if running is not None or not is_due:
            return
        if self.source.cache.touch(shard):
            self._was_there.add(shard)
            return
        self._downloads[shard] = pool.submit(self.source.cache.ensure, shard, self._stop, self._keys)
        if shard in self._was_there:
            self._was_there.remove(shard)
            self._count_loss()

    def _count_loss(self) -> None:
        self._num_lost += 1
        if self._num_lost == MAX_LOST:
            self._messages.append(
                f"{MAX_LOST} shards gave way to others before their images were used, and are fetched again: several "
                f"runs share {self.source.cache.folder}, or a process is far behind. Give the cache more room "
                f"(--data.cache-gb), or each run its own (--data.cache-dir)."
            )

    def _look_at(self, shard: CachedShard, error: BaseException | None) -> None:
        if error is None or isinstance(error, Stopped):
            return
        self._failed[shard] = time.monotonic()
        if not isinstance(error, DataError):
            raise error
        self._messages.append(f"{error} It is not needed yet and is tried again.")
