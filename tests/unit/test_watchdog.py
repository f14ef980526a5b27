import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from poa.distributed import ONE, Ranks
from poa.train import watchdog
from poa.train.watchdog import START_FACTOR, Watchdog

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "poa.train"])
SECONDS = 0.4


def child(work, folder, *arguments):
    handle = os.open(folder / "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    sys.exit(work(folder, *arguments))


def start(work, folder, *arguments):
    process = SERVER.Process(target=child, args=(work, folder, *arguments))
    process.start()
    return process


def outcome(work, folder, *arguments):
    process = start(work, folder, *arguments)
    process.join(60)
    return process.exitcode, (folder / "err").read_text()


def wait_for_ever_in_the_data_source():
    threading.Event().wait()


def hang_after_a_step(folder):
    with Watchdog(SECONDS / 60, folder, Ranks(3, 4, 1, 2)) as dog:
        for step in range(8):
            dog.beat(f"training step {step + 1}", step)
        wait_for_ever_in_the_data_source()


def test_a_hang_ends_the_process_and_leaves_the_stacks_of_all_threads_and_what_it_was_doing(tmp_path):
    status, err = outcome(hang_after_a_step, tmp_path)
    assert status == 1
    file = tmp_path / "hangs" / "rank-3-step-7.txt"
    for text in (err, file.read_text()):
        assert "process 3 of 4" in text
        assert "training step 8" in text
        assert "wait_for_ever_in_the_data_source" in text
        assert "_watch" in text
    assert str(file) in err
    outcome(hang_after_a_step, tmp_path)
    assert file.read_text().count("process 3 of 4") == 2


def hang_on_a_full_disk(folder):
    (folder / "hangs").write_text("in the way")
    hang_after_a_step(folder)


def hang_on_a_disk_that_hangs(folder):
    watchdog._REPORT_SECONDS = 0.5
    (folder / "hangs").mkdir()
    os.mkfifo(folder / "hangs" / "rank-3-step-7.txt")
    hang_after_a_step(folder)


def test_a_hang_ends_the_process_where_the_report_cannot_be_written(tmp_path):
    status, err = outcome(hang_on_a_full_disk, tmp_path)
    assert status == 1
    assert "could not be written to the run directory" in err
    (tmp_path / "hangs").unlink()
    status, err = outcome(hang_on_a_disk_that_hangs, tmp_path)
    assert status == 1
    assert "wait_for_ever_in_the_data_source" in err


def work_while_stopped(folder):
    """Beats until it's told that it was stopped for longer than the limit, and long after."""
    with Watchdog(SECONDS / 60, folder, ONE) as dog:
        for step in range(3):
            dog.beat("warming up", step)
        (folder / "ready").touch()
        while not (folder / "woken").exists():
            time.sleep(SECONDS / 100)
        for step in range(3, 60):
            time.sleep(SECONDS / 20)
            dog.beat("going on", step)
    return 0


def test_a_process_that_was_stopped_for_long_is_not_taken_for_one_that_hangs(tmp_path):
    process = start(work_while_stopped, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.001)
    for _ in range(3):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * SECONDS)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(SECONDS / 50)
    (tmp_path / "woken").touch()
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert not (tmp_path / "hangs").exists()


@pytest.fixture
def dog(tmp_path, monkeypatch):
    """A watchdog whose time is moved by hand: `dog.pass_ticks(n)` is True if it bites within n ticks."""

    class Bite(Exception):  # noqa: N818
        pass

    class Closed:
        def __init__(self, num):
            self.num = num

        def wait(self, _):
            self.num -= 1
            return self.num < 0

    class ByHand(Watchdog):
        def _end(self, _):
            raise Bite

        def bites_within(self, num_ticks):
            self._closed = Closed(num_ticks)
            try:
                self._watch()
            except Bite:
                return True
            return False

    return ByHand(1.0, tmp_path, ONE)


def test_the_first_step_of_a_process_has_more_time_wherever_the_run_goes_on(dog):
    for resumed_at in (0, 500):
        dog.beat("reading the checkpoint", 0)
        dog.beat("training", resumed_at)
        assert not dog.bites_within(60 * START_FACTOR - 1)
        assert dog.bites_within(60 * START_FACTOR)
    dog.beat("training", 501)
    assert not dog.bites_within(59)
    assert dog.bites_within(60)
    dog.beat("saving", 501)
    assert not dog.bites_within(59)


def test_zero_minutes_watch_nothing(tmp_path):
    before = threading.active_count()
    with Watchdog(0, tmp_path, ONE) as dog:
        dog.beat("training", 0)
        assert threading.active_count() == before


def test_a_watchdog_leaves_no_thread_behind(tmp_path):
    before = threading.active_count()
    with Watchdog(1, tmp_path, ONE) as dog:
        dog.beat("training", 0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
