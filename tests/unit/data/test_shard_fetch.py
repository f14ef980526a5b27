"""Downloads and the cache of shards, on bad days."""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time

import pytest

from poa.config import DataConfig
from poa.data.shards import fetch as fetching
from poa.data.shards.cache import CachedShard, ShardCache
from poa.data.shards.fetch import Content, Stop, Stopped, fetch
from poa.errors import DataError
from tests.shard_server import serving

SIZE = 300_000


def content_of(number):
    return bytes([number]) * SIZE


@pytest.fixture
def server(tmp_path):
    (tmp_path / "remote").mkdir()
    for number in range(6):
        (tmp_path / "remote" / f"{number}.tar").write_bytes(content_of(number))
    with serving(tmp_path / "remote") as found:
        yield found


def options(tmp_path, **more):
    return DataConfig(
        cache_dir=str(tmp_path / "cache"), **({"retries": 2, "retry_seconds": 0.01, "stall_seconds": 30.0} | more)
    )


def shard(server, number):
    sha256 = hashlib.sha256(content_of(number)).hexdigest()
    return CachedShard(f"{sha256}.tar", f"{server.url}/{number}.tar", Content(SIZE, sha256), SIZE)


def cache_of(tmp_path, **more):
    cache = ShardCache(options(tmp_path, **more))
    cache.prepare()
    return cache


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in (".room", ".indexes"))


@pytest.mark.parametrize("faults", [["torn"], ["flipped"], [500, 503], [429], ["dropped"], ["torn", "flipped"]])
def test_what_passes_is_tried_again(server, tmp_path, faults):
    server.faults["1.tar"] = list(faults)
    cache = cache_of(tmp_path)
    assert cache.read(shard(server, 1), 5, 9) == bytes([1]) * 9
    assert server.requests["1.tar"] == len(faults) + 1
    assert names_in(cache.folder) == [shard(server, 1).key]


def test_a_stalled_server_is_left_and_asked_again(server, tmp_path):
    server.faults["1.tar"] = ["stalled"]
    cache = cache_of(tmp_path, stall_seconds=0.5, retries=9)
    assert cache.read(shard(server, 1), SIZE - 3, 9) == bytes([1]) * 3
    assert server.requests["1.tar"] >= 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "500"),
        ("torn", "bytes|payload"),
        ("flipped", "SHA-256"),
        ("stalled", r"no byte came for 0\.2 s|[Tt]imeout"),
    ],
)
def test_after_the_last_try_the_error_says_what_how_often_and_why(server, tmp_path, fault, reason):
    server.faults["1.tar"] = [fault] * 9
    cache = cache_of(tmp_path, stall_seconds=0.2 if fault == "stalled" else 30.0)
    with pytest.raises(DataError, match=rf"/1\.tar could not be fetched: 3 tries in \d+ s failed.*({reason})"):
        cache.ensure(shard(server, 1))
    assert server.requests["1.tar"] == 3
    assert names_in(cache.folder) == []


@pytest.mark.parametrize(("fault", "message"), [(404, r"there is no .*1\.tar"), (403, "may not be read"), (401, "401")])
def test_what_will_not_pass_is_told_at_once(server, tmp_path, fault, message):
    server.faults["1.tar"] = [fault] * 9
    with pytest.raises(DataError, match=message):
        cache_of(tmp_path).ensure(shard(server, 1))
    assert server.requests["1.tar"] == 1


def test_waits_double_and_vary(monkeypatch):
    waits = [[fetching._delay(1.0, url, attempt) for attempt in range(1, 12)] for url in ("a", "b")]
    for found in waits:
        for attempt, wait in enumerate(found):
            assert 0.5 * min(60, 2**attempt) <= wait <= 1.5 * min(60, 2**attempt)
    assert waits[0] != waits[1]


def test_the_secrets_of_a_redirect_stay_out_of_the_message():
    error = fetching.redacted("500, url='https://u:pw@host/x.tar?X-Amz-Signature=abc&token=z' and\nmore")
    assert error == "500, url='https://…host/x.tar…' and more"


def read_in_process(cache, wanted, barrier, results):
    barrier.wait()
    results.put(cache.read(wanted, 0, 4))


def test_of_several_processes_and_threads_one_fetches_a_shard(server, tmp_path):
    server.slowness = 0.3
    cache, wanted = cache_of(tmp_path), shard(server, 2)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (cache, wanted, barrier, results)
    processes = [context.Process(target=read_in_process, args=arguments) for _ in range(2)]
    threads = [threading.Thread(target=read_in_process, args=arguments) for _ in range(2)]
    for each in (*processes, *threads):
        each.start()
    assert [results.get(timeout=20) for _ in range(4)] == [bytes([2]) * 4] * 4
    for each in (*processes, *threads):
        each.join()
    assert server.requests["2.tar"] == 1


def test_when_the_one_that_fetches_is_killed_another_takes_over(server, tmp_path):
    server.faults["3.tar"] = ["stalled"]
    cache, wanted = cache_of(tmp_path, stall_seconds=60.0), shard(server, 3)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=cache.ensure, args=(wanted,))
    process.start()
    while not (server.requests["3.tar"] and any(name.endswith(".part") for name in names_in(cache.folder))):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = names_in(cache.folder)
    assert any(name.endswith(".part") for name in left)
    assert cache.read(wanted, 0, 2) == bytes([3]) * 2
    cache.prepare()
    assert names_in(cache.folder) == [wanted.key]


def test_what_killed_processes_left_is_removed_and_what_others_fetch_now_is_not(server, tmp_path):
    server.slowness = 1.0
    cache, wanted = cache_of(tmp_path), shard(server, 4)
    dead = "ab" * 32
    (cache.folder / f"{dead}.tar.x.part").write_bytes(b"12")
    (cache.folder / f"{dead}.tar.lock").write_bytes(b"2")
    thread = threading.Thread(target=cache.ensure, args=(wanted,))
    thread.start()
    while not any(name.startswith(wanted.key) and name.endswith(".part") for name in names_in(cache.folder)):
        time.sleep(0.01)
    cache.prepare()
    assert {name[:4] for name in names_in(cache.folder)} == {wanted.key[:4]}
    thread.join()
    assert names_in(cache.folder) == [wanted.key]
    assert server.requests["4.tar"] == 1


def test_the_least_recently_used_give_way_before_the_bound_is_passed(server, tmp_path):
    cache = cache_of(tmp_path, cache_gb=3.5 * SIZE / 1e9)
    shards = [shard(server, number) for number in range(5)]
    for number, each in enumerate(shards[:3]):
        cache.ensure(each)
        os.utime(cache.folder / each.key, (number, number))
    assert cache.touch(shards[0])
    cache._touched.clear()
    assert cache.touch(shards[0])
    cache.ensure(shards[3])
    assert set(names_in(cache.folder)) == {shards[number].key for number in (0, 2, 3)}
    cache.ensure(shards[4])
    assert set(names_in(cache.folder)) == {shards[number].key for number in (0, 3, 4)}


def test_shards_that_will_be_wanted_give_way_last(server, tmp_path):
    cache = cache_of(tmp_path, cache_gb=3.5 * SIZE / 1e9)
    shards = [shard(server, number) for number in range(4)]
    for number, each in enumerate(shards[:3]):
        cache.ensure(each)
        os.utime(cache.folder / each.key, (number, number))
    cache.ensure(shards[3], keep={shards[0].key, shards[1].key})
    assert set(names_in(cache.folder)) == {shards[number].key for number in (0, 1, 3)}


def test_files_that_are_not_the_caches_stay(server, tmp_path):
    cache = cache_of(tmp_path, cache_gb=1.5 * SIZE / 1e9)
    others = [cache.folder / name for name in ("photos.tar", "a.part", "b.lock", "c" * 64)]
    for file in others[:3]:
        file.write_bytes(b"mine")
        os.utime(file, (0, 0))
    others[3].mkdir()
    for number in range(3):
        cache.ensure(shard(server, number))
    cache.prepare()
    assert all(file.exists() for file in others)


def test_readers_whose_shard_gives_way_fetch_it_again(server, tmp_path):
    cache = cache_of(tmp_path, cache_gb=1.5 * SIZE / 1e9)
    for number in (0, 1, 0, 1):
        assert cache.read(shard(server, number), 7, 3) == bytes([number]) * 3
    assert server.requests["0.tar"] == server.requests["1.tar"] == 2


def test_two_downloads_keep_the_bound_together(server, tmp_path):
    server.slowness = 0.2
    cache = cache_of(tmp_path, cache_gb=1.5 * SIZE / 1e9)
    threads = [threading.Thread(target=cache.ensure, args=(shard(server, number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        sizes = [entry.stat().st_size for entry in os.scandir(cache.folder) if entry.name.endswith((".tar", ".part"))]
        most = max(most, sum(sizes))
        time.sleep(0.005)
    assert most <= cache.limit
    assert len(names_in(cache.folder)) == 1


def test_a_shard_of_another_size_than_indexed_is_fetched_anew(server, tmp_path):
    cache, wanted = cache_of(tmp_path), shard(server, 5)
    cache.ensure(wanted)
    (cache.folder / wanted.key).write_bytes(b"cut short")
    assert cache.read(wanted, SIZE - 2, 2) == bytes([5]) * 2


def test_what_does_not_fit_the_bound_or_the_disk_is_refused_before(tmp_path, monkeypatch):
    cache = cache_of(tmp_path, cache_gb=1.0)
    with pytest.raises(DataError, match=r"eleven shards take 1\.1 GB, and data\.cache_gb is 1.*--data\.cache-gb 1\.11"):
        cache.check_room(1_100_000_000, "eleven shards")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**8}))
    with pytest.raises(DataError, match=r"the disk of .* has room for 0\.1.*--data\.cache-dir"):
        cache.check_room(900_000_000, "eleven shards")


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that has room for so many shards."""

    def with_room_for(count, folder):
        real = fetching._download

        def download(url, part, stall_seconds, stop):
            if sum(1 for _ in folder.glob("*.tar")) >= count:
                raise fetching.DiskFull from OSError(errno.ENOSPC, "no space")
            return real(url, part, stall_seconds, stop)

        monkeypatch.setattr(fetching, "_download", download)

    return with_room_for


def test_on_a_full_disk_more_gives_way(server, tmp_path, full_disk):
    cache = cache_of(tmp_path)
    full_disk(2, cache.folder)
    for number in range(4):
        cache.ensure(shard(server, number))
        os.utime(cache.folder / shard(server, number).key, (number, number))
    assert set(names_in(cache.folder)) == {shard(server, number).key for number in (2, 3)}


def test_a_disk_full_of_other_things_is_told(server, tmp_path, full_disk):
    cache = cache_of(tmp_path)
    full_disk(0, cache.folder)
    with pytest.raises(DataError, match=r"the disk of .* is full.*--data\.cache-dir"):
        cache.ensure(shard(server, 0))
    assert names_in(cache.folder) == []


def test_no_space_is_told_from_other_errors(tmp_path):
    with pytest.raises(fetching.DiskFull):
        fetching._reason("http://h/1.tar", OSError(errno.ENOSPC, "no space left"))
    assert "reset" in fetching._reason("http://h/1.tar", ConnectionResetError("reset by peer"))


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--data\.cache-dir"):
        ShardCache(DataConfig(cache_dir=str(tmp_path / "file" / "cache"))).prepare()


@pytest.mark.parametrize("fault", ["stalled", 500])
def test_a_download_that_is_no_longer_wanted_ends(server, tmp_path, fault):
    server.faults["1.tar"] = [fault]
    stop = Stop()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        fetch(
            f"{server.url}/1.tar", tmp_path / "1", options(tmp_path, stall_seconds=60.0, retry_seconds=60.0), stop=stop
        )
    assert not (tmp_path / "1").exists()


def test_a_missing_driver_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    import fsspec

    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(DataError, match=r'pip install "poa\[s3\]"'):
        fetch("s3://bucket/1.tar", tmp_path / "1", options(tmp_path))
