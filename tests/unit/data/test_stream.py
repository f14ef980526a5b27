"""Batches whose shards are fetched ahead."""

import itertools
import multiprocessing
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from poa.config import DataConfig, PretrainConfig
from poa.data import BatchStream, EpochPlan, MultiCropBatches, open_source
from poa.data.shards import INDEX_NAME
from poa.data.shards.prefetch import Prefetcher
from poa.distributed import Ranks
from poa.errors import DataError, PoaWarning
from tests.shard_server import serving, write_index, write_tars
from tests.unit.data.test_loader import assert_same, make_batches, make_config

SIZES = [8, 6, 10, 8, 8, 7, 9, 8]
WINDOW = 3


@pytest.fixture
def server(tmp_path):
    folder = write_tars(tmp_path / "shards", SIZES)
    write_index(folder)
    with serving(folder) as found:
        yield found


@pytest.fixture
def config(server, tmp_path):
    """Two windows of the largest shards fit into the cache, and no more."""
    largest = sorted((server.folder / f"s-{number:04d}.tar").stat().st_size for number in range(len(SIZES)))
    data = DataConfig(
        cache_dir=str(tmp_path / "cache"),
        cache_gb=sum(largest[-2 * WINDOW :]) / 1e9,
        window=WINDOW,
        downloads=2,
        retries=1,
        retry_seconds=0.01,
        stall_seconds=60.0,
    )
    return replace(make_config(batch_size=4, channels=3, num_local=0), data=data)


def batches_of(server, config: PretrainConfig, ranks=Ranks()):  # noqa: B008
    source = open_source(f"{server.url}/s-{{0000..{len(SIZES) - 1:04d}}}.tar", config.data, 3)
    return MultiCropBatches(source, EpochPlan.of(source, config, ranks), config)


def wait_until(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come to that")


@pytest.fixture
def no_child_is_left():
    """Whether all processes that the test started have ended; other tests may have left some."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) <= before


def threads_of_poa():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("poa-prefetch")]


def num_fetched(server):
    return {name: count for name, count in server.requests.items() if name != INDEX_NAME}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_fetches_every_shard_once_and_any_number_of_workers_gives_the_same(server, config, num_workers):
    config = replace(config, data=replace(config.data, cache_gb=1.0))
    batches = batches_of(server, config)
    num = batches.plan.steps_per_epoch
    with BatchStream(batches, 0, num, num_workers, pin_memory=False) as stream:
        shown = list(stream)
    assert set(num_fetched(server).values()) == {1}
    folder = open_source(str(server.folder), config.data, 3)
    local = MultiCropBatches(folder, EpochPlan.of(folder, config), config)
    for step, batch in enumerate(shown):
        assert_same(batch, local[step])
    assert not threads_of_poa()


def test_a_run_that_goes_on_shows_what_was_left_on_any_number_of_ranks(server, config):
    batches = batches_of(server, config)
    num = batches.plan.steps_per_epoch
    with BatchStream(batches, 0, num, 1, pin_memory=False) as stream:
        shown = [next(stream).indices for _ in range(3)]
    for rank in range(2):
        part = batches_of(server, config, Ranks(rank, 2, rank, 2))
        with BatchStream(part, 3, num, 1, pin_memory=False) as stream:
            shown += [batch.indices for batch in stream]
    together = np.concatenate(shown)
    assert len(together) == len(set(together.tolist())) == num * 4 == sum(SIZES)


def test_shards_are_fetched_before_they_are_wanted_and_within_the_bound(server, config):
    batches = batches_of(server, config)
    num = batches.plan.steps_per_epoch
    with BatchStream(batches, 0, num, 0, pin_memory=False) as stream:
        needed = set(batches.plan.position(0)[1].tolist())
        next(stream)
        at_first = len({np.searchsorted(np.cumsum(SIZES), index, side="right") for index in needed})
        wait_until(lambda: len(num_fetched(server)) > at_first)
        for _ in stream:
            kept = [file.stat().st_size for file in batches.source.cache.folder.glob("*.tar")]
            assert sum(kept) <= batches.source.cache.limit


def test_what_cannot_be_fetched_ahead_is_warned_of_and_no_harm_until_it_is_needed(server, config):
    batches = batches_of(server, config)
    order = np.concatenate([batches.plan.position(step)[1] for step in range(batches.plan.steps_per_epoch)])
    last = int(np.searchsorted(np.cumsum(SIZES), order[-1], side="right"))
    hidden = (server.folder / f"s-{last:04d}.tar").rename(server.folder / "hidden")
    roomy = replace(config, data=replace(config.data, cache_gb=1.0))
    batches = batches_of(server, roomy)
    with BatchStream(batches, 0, batches.plan.steps_per_epoch, 0, pin_memory=False) as stream:
        next(stream)
        wait_until(lambda: server.requests[f"s-{last:04d}.tar"])
        wait_until(lambda: stream._prefetcher._messages)
        with pytest.warns(PoaWarning, match=rf"there is no .*s-{last:04d}\.tar.* not needed yet"):
            next(stream)
        with pytest.raises(DataError, match=rf"there is no .*s-{last:04d}\.tar"):
            list(stream)
    hidden.rename(server.folder / f"s-{last:04d}.tar")
    with BatchStream(batches, 0, batches.plan.steps_per_epoch, 0, pin_memory=False) as stream:
        assert len(list(stream)) == batches.plan.steps_per_epoch


def test_a_defect_of_the_threads_arrives_in_the_training(server, config, monkeypatch):
    batches = batches_of(server, config)
    monkeypatch.setattr(Prefetcher, "_advance", lambda _: 1 / 0)
    with BatchStream(batches, 0, 9, 0, pin_memory=False) as stream:
        next(stream)
        wait_until(lambda: stream._prefetcher._error)
        with pytest.raises(ZeroDivisionError):
            next(stream)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_is_stopped_ends_although_the_server_hangs(server, config, num_workers, no_child_is_left):
    batches = batches_of(server, config)
    for number in range(len(SIZES)):
        server.faults[f"s-{number:04d}.tar"] = ["stalled"] * 9
    with BatchStream(batches, 0, 9, num_workers, pin_memory=False) as stream:
        threading.Timer(0.5, stream.stop).start()
        assert list(stream) == []
        assert list(stream) == []
    wait_until(no_child_is_left)
    assert not threads_of_poa()


def test_leaving_the_block_ends_workers_that_wait_for_a_server_that_hangs(server, config, no_child_is_left):
    batches = batches_of(server, config)
    with BatchStream(batches, 0, 9, 2, pin_memory=False) as stream:
        next(stream)
        for number in range(len(SIZES)):
            server.faults[f"s-{number:04d}.tar"] = ["stalled"] * 9
    wait_until(no_child_is_left)
    assert not threads_of_poa()


def test_downloads_go_on_in_this_process_after_a_stream_was_left(server, config):
    batches = batches_of(server, config)
    with BatchStream(batches, 0, 9, 0, pin_memory=False) as stream:
        next(stream)
    assert batches.source.load(0).size
    assert batches.source.load(len(batches.source) - 1).size


def test_one_process_of_a_machine_fetches_for_all_of_it(server, config):
    data = replace(config.data, lanes=2, cache_gb=1.0)
    two_lanes = replace(config, data=data, train=replace(config.train, batch_size=8))
    parts = [batches_of(server, two_lanes, Ranks(rank, 4, rank % 2, 2)) for rank in range(4)]
    streams = [BatchStream(part, 0, 5, 0, pin_memory=False) for part in parts]
    assert [stream._prefetcher is not None for stream in streams] == [True, False, True, False]
    for step in range(5):
        first = streams[0]._prefetcher._indices(step).tolist()
        whole = parts[0].plan.position(step)[1]
        assert first == [*whole[parts[0].plan.ranks.part(8)], *whole[parts[1].plan.ranks.part(8)]]


def test_a_cache_without_room_for_two_windows_is_refused_before_work(server, config):
    small = replace(config, data=replace(config.data, cache_gb=0.9 * config.data.cache_gb))
    with pytest.raises(DataError, match=r"6 shards, those of two windows .*--data\.cache-gb"):
        BatchStream(batches_of(server, small), 0, 9, 0, pin_memory=False)


def test_other_sources_stream_as_they_load():
    batches = make_batches()
    with BatchStream(batches, 2, 6, 0, pin_memory=False) as stream:
        shown = list(stream)
    assert len(shown) == 4
    for step, batch in enumerate(shown, start=2):
        assert_same(batch, batches[step])


def test_the_time_that_training_waits_is_counted(monkeypatch):
    clock = itertools.count(step=3)
    monkeypatch.setattr("poa.data.stream.time.monotonic", lambda: next(clock))
    with BatchStream(make_batches(), 0, 4, 0, pin_memory=False) as stream:
        assert stream.waited_seconds == 0
        next(stream)
        assert stream.waited_seconds > 0
