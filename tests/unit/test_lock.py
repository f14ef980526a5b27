import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket

import pytest

from poa.distributed import ONE, Ranks
from poa.errors import CheckpointError, PoaWarning
from poa.train import lock
from poa.train.lock import LOCK_FILE, RunLock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "poa.train"])


def sleep_for_ever():
    signal.pause()


def hold(folder, pipe, content=None, with_worker=False):
    with RunLock(folder, ONE):
        worker = multiprocessing.get_context("fork").Process(target=sleep_for_ever)
        if with_worker:
            worker.start()
        if content is not None:
            (folder / LOCK_FILE).write_bytes(content)
            # Writing has closed a descriptor of the file, and with it the lock is gone.
            handle = os.open(folder / LOCK_FILE, os.O_RDWR)
            fcntl.lockf(handle, fcntl.LOCK_EX)
        pipe.send(worker.pid)
        pipe.recv()


class Holder:
    """A process that has the lock."""

    def __init__(self, folder, **options):
        self.pipe, end = SERVER.Pipe()
        self.process = SERVER.Process(target=hold, args=(folder, end), kwargs=options)
        self.process.start()
        self.worker = self.pipe.recv()

    def let_go(self):
        self.pipe.send("now")
        self.process.join()

    def die(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture
def holder(tmp_path):
    found = Holder(tmp_path / "run")
    yield found
    found.die()


def refusal(folder):
    with pytest.raises(CheckpointError) as found, RunLock(folder, ONE):
        pass
    return str(found.value)


def test_a_second_run_is_refused_with_the_host_process_and_start_of_the_first(holder, tmp_path):
    since = json.loads((tmp_path / "run" / LOCK_FILE).read_text())["since"]
    for _ in range(2):
        text = refusal(tmp_path / "run")
        for part in (str(tmp_path / "run"), f"process {holder.process.pid}", socket.gethostname(), since, "--out"):
            assert part in text


def test_the_lock_is_free_when_its_holder_lets_go_or_is_killed_though_a_data_worker_lives_on(tmp_path):
    Holder(tmp_path).let_go()
    killed = Holder(tmp_path, with_worker=True)
    killed.die()
    os.kill(killed.worker, 0)
    with RunLock(tmp_path, ONE):
        pass
    os.kill(killed.worker, signal.SIGKILL)


def try_in_another_process(folder):
    process = SERVER.Process(target=refusal, args=(folder,))
    process.start()
    process.join()
    return process.exitcode


def test_a_second_lock_of_the_same_process_is_refused_and_leaves_the_first_in_place(tmp_path):
    with RunLock(tmp_path, ONE):
        assert f"process {os.getpid()}" in refusal(tmp_path / ".." / tmp_path.name)
        assert try_in_another_process(tmp_path) == 0
    assert try_in_another_process(tmp_path) == 1


def test_only_the_main_process_locks(holder, tmp_path):
    with RunLock(tmp_path / "run", Ranks(1, 2, 1, 2)), RunLock(tmp_path / "other", Ranks(1, 2, 1, 2)):
        pass
    assert not (tmp_path / "other").exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_lock(handle, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_lock)
    with pytest.warns(PoaWarning, match="no locks available"), RunLock(tmp_path, ONE):
        pass


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    assert f"cannot write into {tmp_path / 'file' / 'run'}" in refusal(tmp_path / "file" / "run")
    with RunLock(tmp_path / "run", ONE):
        pass


def test_a_run_that_did_not_begin_leaves_no_directory_behind(tmp_path):
    with RunLock(tmp_path / "new", ONE):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
    with RunLock(tmp_path / "new", ONE):
        (tmp_path / "new" / "config.yaml").touch()
    with RunLock(tmp_path / "new", ONE):
        (tmp_path / "new" / "config.yaml").unlink()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [LOCK_FILE]


def test_a_lock_file_that_its_holder_removes_does_not_count(tmp_path, monkeypatch):
    folder, lockf, removed = tmp_path / "run", fcntl.lockf, []

    def removed_before_it_is_locked(handle, how):
        if not removed:
            removed.append(handle)
            (folder / LOCK_FILE).unlink()
            folder.rmdir()
        lockf(handle, how)

    monkeypatch.setattr(fcntl, "lockf", removed_before_it_is_locked)
    with RunLock(folder, ONE):
        assert removed
        assert try_in_another_process(folder) == 0


def elsewhere(since="2026-01-01"):
    return json.dumps({"host": "elsewhere", "pid": 7, "since": since}).encode()


def test_a_lock_of_another_machine_is_waited_for_as_long_as_a_file_server_may_take(tmp_path, monkeypatch):
    holder = Holder(tmp_path, content=elsewhere())
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.05)
    with pytest.warns(PoaWarning, match="process 7 on elsewhere since 2026-01-01"):
        assert "process 7 on elsewhere" in refusal(tmp_path)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 120)
    monkeypatch.setattr(lock.time, "sleep", lambda _: holder.die())
    with pytest.warns(PoaWarning, match="ends in 120 s"), RunLock(tmp_path, ONE):
        assert try_in_another_process(tmp_path) == 0


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff" * 800, b"[]", b"{}", b'{"host": "a", "pid": "\x1b[2J", "since": ""}', b"[" * 5000]
)
def test_a_lock_file_that_says_nothing_useful_is_refused_all_the_same(tmp_path, content):
    holder = Holder(tmp_path, content=content)
    assert "another process" in refusal(tmp_path)
    holder.die()


def test_what_a_lock_file_says_cannot_steer_the_terminal(tmp_path, monkeypatch):
    holder = Holder(tmp_path, content=elsewhere(since="\x1b[2J now"))
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
    with pytest.warns(PoaWarning, match="elsewhere"):
        assert "\\x1b[2J now" in refusal(tmp_path)
    holder.die()
