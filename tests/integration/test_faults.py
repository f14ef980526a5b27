"""What a run does when something breaks, through the command line; each fault in a process of its own.

Most processes are forked from a server that has torch loaded, in the environment that torchrun makes. The slow tests
start torchrun itself.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from poa.distributed import ONE
from poa.train.lock import RunLock
from tests.integration.test_pretrain_cli import (
    SERVER,
    TINY,
    Command,
    child,
    last_step,
    metrics,
    poa,
    pretrain,
    steps_saved,
    succeed,
    weights,
)
from tests.shard_server import serving, write_index, write_tars

NUM_STEPS = 30
OPTIONS = ("--train.checkpoint-every", "5", "--train.log-every", "1", "--monitor.every", "0")
RUN = pretrain(*OPTIONS)
DAY = 86_400.0


def faulty_child(environment, fault, arguments, folder, out, err):
    os.environ.update(environment)
    if fault is not None:
        name, *values = fault
        FAULTS[name](*values)
    child(arguments, folder, out, err)


class Faulty(Command):
    """A command with a fault in its process: a name in `FAULTS` with its arguments."""

    def __init__(self, folder, *arguments, fault=None, environment=None):
        Command.count += 1
        self.files = [folder / f".command-{Command.count}.{name}" for name in ("out", "err")]
        values = (environment or {}, fault, [str(part) for part in arguments], folder, *self.files)
        self.process = SERVER.Process(target=faulty_child, args=values)
        self.process.start()


class Pair:
    """Two processes that train together, as torchrun starts them."""

    def __init__(self, folder, *arguments, faults=(None, None), folders=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.commands = []
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **place}
            environment = {name: str(value) for name, value in environment.items()}
            where = folders[rank] if folders else folder
            self.commands.append(Faulty(where, *arguments, fault=faults[rank], environment=environment))

    def wait(self):
        found = [command.wait() for command in self.commands]
        return SimpleNamespace(statuses=[each.status for each in found], errs=[each.err for each in found])


def not_finite_at(steps):
    """At these steps what the network sees is not finite, in this process."""
    from poa.train import loop, step

    to_views, train_step, now = step.to_views, loop.train_step, []

    def watched(trainer, batches, at, **options):
        now[:] = [at + 1]
        return train_step(trainer, batches, at, **options)

    def poisoned(*arguments, **options):
        views = to_views(*arguments, **options)
        return views._replace(global_crops=views.global_crops * torch.nan) if now[0] in steps else views

    step.to_views, loop.train_step = poisoned, watched


def clock_jumps():
    """Whoever asks for the time gets the right one, or that of yesterday or of tomorrow."""
    now, now_ns, jumps = time.time, time.time_ns, itertools.cycle([0.0, DAY, 0.0, -DAY, -DAY, DAY])
    time.time = lambda: now() + next(jumps)
    time.time_ns = lambda: now_ns() + int(next(jumps) * 1e9)


def source_hangs_at(batch):
    """From this batch on the source gives nothing; when the processes are started again, it does."""
    from poa.data import MultiCropBatches

    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    get = MultiCropBatches.__getitem__

    def hanging(self, at):
        if at >= batch:
            threading.Event().wait()
        return get(self, at)

    MultiCropBatches.__getitem__ = hanging


FAULTS = {function.__name__: function for function in (not_finite_at, clock_jumps, source_hangs_at)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    succeed(folder, *RUN)
    return folder / "run"


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole-pair")
    (folder / "tiny.yaml").write_text(TINY)
    found = Pair(folder, *RUN).wait()
    assert found.statuses == [0, 0], found.errs
    return folder / "run"


def stopped(folder, number=signal.SIGTERM, at=12, *arguments):
    """A run stopped by a signal after that step; gives back the step that it saved."""
    command = Command(folder, *RUN, *arguments)
    assert command.wait_until(lambda: last_step(folder / "run") >= at)
    command.kill(number)
    found = command.wait()
    assert found.status == 128 + number, found.err
    return steps_saved(folder / "run")[-1]


def assert_ends_as(whole, folder):
    assert weights(folder / "run") == weights(whole)
    assert metrics(folder / "run") == metrics(whole)


def test_a_second_run_into_a_directory_is_refused_and_reading_it_is_not(folder, whole):
    shutil.copytree(whole, folder / "run")
    with RunLock(folder / "run", ONE):
        refused = poa(folder, *RUN)
        assert refused.status == 1
        assert f"run is in use by a run: process {os.getpid()} on {socket.gethostname()} since 20" in refused.err
        assert "Traceback" not in refused.err
        succeed(folder, "subnets", "run")
        assert poa(folder, *RUN).status == 1
    succeed(folder, *RUN)


def descendants(process):
    tasks = Path(f"/proc/{process}/task")
    found = [int(each) for task in tasks.glob("*") for each in (task / "children").read_text().split()]
    return [*found, *(each for child_process in found for each in descendants(child_process))]


def test_sigusr1_stops_a_run_as_sigterm_does_though_all_its_processes_get_it(folder, whole):
    command = Command(folder, *RUN, "--runtime.num-workers", "1")
    assert command.wait_until(lambda: last_step(folder / "run") >= 7)
    for process in descendants(command.process.pid):
        os.kill(process, signal.SIGUSR1)
    command.kill(signal.SIGUSR1)
    found = command.wait()
    assert found.status == 128 + signal.SIGUSR1, found.err
    saved = steps_saved(folder / "run")[-1]
    assert f"Stopped after step {saved} of {NUM_STEPS}; saved." in found.err
    assert f"Resuming after step {saved}" in succeed(folder, *RUN).err
    assert_ends_as(whole, folder)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(folder, whole_pair):
    pair = Pair(folder, *RUN)
    assert pair.commands[0].wait_until(lambda: last_step(folder / "run") >= 7)
    pair.commands[1].kill(signal.SIGTERM)
    found = pair.wait()
    assert found.statuses == [143, 143], found.errs
    saved = steps_saved(folder / "run")[-1]
    assert last_step(folder / "run") == saved < NUM_STEPS
    assert f"Stopped after step {saved} of {NUM_STEPS}; saved." in found.errs[0]
    resumed = Pair(folder, *RUN).wait()
    assert resumed.statuses == [0, 0], resumed.errs
    assert f"Resuming after step {saved}" in resumed.errs[0]
    assert_ends_as(whole_pair, folder)


def test_what_is_not_finite_in_one_process_is_skipped_by_both_and_counted(folder, whole_pair):
    found = Pair(folder, *RUN, faults=(None, ("not_finite_at", (4, 9)))).wait()
    assert found.statuses == [0, 0], found.errs
    lines = metrics(folder / "run")
    assert [line["step"] for line in lines if line["skipped_steps"]] == [4, 9]
    assert len(lines) == NUM_STEPS
    assert lines[:3] == metrics(whole_pair)[:3]
    assert "Step 9 was skipped" in found.errs[0]
    assert weights(folder / "run") != weights(whole_pair)


def test_too_many_steps_in_a_row_that_are_not_finite_stop_both_with_the_last_good_state_named(folder, whole_pair):
    bad = ("not_finite_at", tuple(range(13, 99)))
    found = Pair(folder, *RUN, "--train.max-skipped-steps", "3", faults=(None, bad)).wait()
    assert found.statuses == [1, 1], found.errs
    assert "4 steps in a row were not finite, the last was step 16." in found.errs[0]
    assert "The last good state is run/checkpoints/step-00000010." in found.errs[0]
    assert steps_saved(folder / "run")[-1] == 10
    assert not any("Traceback" in err for err in found.errs)


def test_a_checkpoint_that_finds_the_disk_full_costs_nothing_but_itself(folder, whole):
    command = Command(folder, *RUN, "--train.keep-checkpoints", "1")
    assert command.wait_until(lambda: steps_saved(folder / "run") == [5])
    before = resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
    assert command.wait_until(lambda: "could not be written" in command.files[1].read_text())
    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, before)
    found = command.wait()
    assert found.status == 0, found.err
    assert "The newest complete one is run/checkpoints/step-000000" in found.err
    assert steps_saved(folder / "run") == [NUM_STEPS]
    assert_ends_as(whole, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "poa-test", str(disk)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        why = "there is no `mount`" if done is None else done.stderr.strip()
        assert not os.environ.get("POA_REQUIRE_MOUNT"), f"POA_REQUIRE_MOUNT is set, and no disk can be made: {why}"
        pytest.skip(f"a small disk needs the right to mount one (root): {why}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(filler):
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_for_a_while_costs_nothing(folder, small_disk, whole):
    run, filler = small_disk / "run", small_disk / "filler"
    command = Command(folder, *pretrain(*OPTIONS, out=run))
    assert command.wait_until(lambda: steps_saved(run)[-1:] == [5])
    fill(filler)
    assert command.wait_until(lambda: "could not be written" in command.files[1].read_text())
    assert steps_saved(run)
    filler.unlink()
    found = command.wait()
    assert found.status == 0, found.err
    assert "metrics.jsonl cannot be written: No space left on device" in found.err
    assert "Traceback" not in found.err
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)


def torn(file):
    os.truncate(file, file.stat().st_size // 2)


def bit_flipped(file):
    content = bytearray(file.read_bytes())
    content[2 * len(content) // 3] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [("*.safetensors", torn), ("*.safetensors", bit_flipped), ("*.json", torn), ("*.json", Path.unlink)],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, whole, half, pattern, damage):
    shutil.copytree(half, folder / "run")
    older, newest = steps_saved(folder / "run")
    damage(next((folder / "run" / "checkpoints" / f"step-{newest:08d}").glob(pattern)))
    found = succeed(folder, "pretrain", "--out", "run")
    assert "warning:" in found.err
    assert f"step-{newest:08d} is passed over" in found.err
    assert f"Resuming after step {older} of" in found.err
    assert_ends_as(whole, folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run stopped in its middle."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "tiny.yaml").write_text(TINY)
    stopped(folder)
    return folder / "run"


def test_a_clock_that_jumps_by_days_changes_nothing(folder, whole):
    found = Faulty(folder, *RUN, "--runtime.watchdog-minutes", "1", fault=("clock_jumps",)).wait()
    assert found.status == 0, found.err
    assert_ends_as(whole, folder)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["seconds"] < DAY / 2 and line["images_per_second"] > 0 for line in lines)
    assert not (folder / "run" / "hangs").exists()


def test_a_run_directory_that_only_one_process_sees_is_refused(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "tiny.yaml").write_text(TINY)
    found = Pair(folder, *RUN, folders=(folder / "a", folder / "b")).wait()
    assert found.statuses == [1, 1], found.errs
    assert "run is not the directory that the main process sees" in found.errs[1]
    assert not any("Traceback" in err for err in found.errs)


def test_a_run_directory_that_cannot_be_written_is_an_error_that_names_it(folder, small_disk, whole):
    shutil.copytree(whole, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk / "run", small_disk / "new"):
        found = poa(folder, *pretrain(*OPTIONS, out=out))
        assert found.status == 1
        assert f"cannot write into {out}" in found.err
        assert "Traceback" not in found.err


def test_a_source_that_stalls_and_fails_for_a_while_costs_time_alone(folder):
    shards = write_tars(folder / "shards", (40,) * 4)
    write_index(shards)
    patient = ("--data.retries", "3", "--data.retry-seconds", "0.01", "--data.stall-seconds", "0.5")
    options = ("--train.epochs", "1", "--monitor.every", "0", "--data.cache-dir", folder / "cache", *patient)
    succeed(folder, *pretrain(*options, "--data", shards, out="local"))
    with serving(shards) as server:
        url = f"{server.url}/s-{{0000..0003}}.tar"
        faults = {"s-0001.tar": ["stalled", 503, "torn"], "s-0003.tar": ["dropped", "flipped"]}
        server.faults |= faults
        succeed(folder, *pretrain(*options, "--data", url))
        assert not any(faults.values())
        assert weights(folder / "run") == weights(folder / "local")
        shutil.rmtree(folder / "cache")
        server.faults["s-0002.tar"] = [500] * 99
        ended = poa(folder, *pretrain(*options, "--data", url, out="ended"))
    assert ended.status == 1
    assert "s-0002.tar could not be fetched: 4 tries" in ended.err
    assert "Traceback" not in ended.err


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
LAUNCHER = """
import os
import sys

from poa.cli.main import main
from tests.integration.test_faults import FAULTS

rank, name, value, *arguments = sys.argv[1:]
if os.environ["RANK"] == rank:
    FAULTS[name](int(value))
sys.exit(main(arguments))
"""


def torchrun(folder, *command):
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with (folder / "log").open("w") as log:
        return subprocess.Popen([*TORCHRUN, *map(str, command)], cwd=folder, stderr=log, env=environment)


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def group_of(process):
    """The processes that torchrun started, by their rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for each in children:
        environment = Path(f"/proc/{each}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found |= {rank: int(each) for rank in ranks}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_loses_a_process_starts_again_by_itself_and_loses_no_saved_step(folder, whole_pair, rank):
    process = torchrun(folder, "-m", "poa", *RUN)
    wait_until(process, lambda: last_step(folder / "run") >= 7)
    os.kill(group_of(process)[rank], signal.SIGKILL)
    assert process.wait(200) == 0, (folder / "log").read_text()
    log = (folder / "log").read_text()
    assert log.count("Resuming after step") == 1
    assert int(log.split("Resuming after step ")[1].split()[0]) >= 5
    assert_ends_as(whole_pair, folder)


@pytest.mark.slow
def test_a_group_with_a_process_that_hangs_tells_its_stacks_and_starts_again(folder, whole_pair):
    (folder / "launch.py").write_text(LAUNCHER)
    arguments = (*RUN, "--runtime.watchdog-minutes", "0.1")
    process = torchrun(folder, "launch.py", "1", "source_hangs_at", "12", *arguments)
    assert process.wait(200) == 0, (folder / "log").read_text()
    stacks = (folder / "run" / "hangs" / "rank-1-step-12.txt").read_text()
    assert "process 1 of 2 made no progress" in stacks
    assert "in hanging" in stacks
    assert "Resuming after step 10 of" in (folder / "log").read_text()
    assert_ends_as(whole_pair, folder)


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(folder, name, *options):
    command = [sys.executable, str(BENCHMARKS / name), "--json", "found.json", *options]
    found = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    return found, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_runs_killed_at_random_moments_lose_no_complete_checkpoint_and_end_as_those_left_alone(folder):
    found, record = benchmark(folder, "kill_runs.py", "--num-runs", "4")
    assert found.returncode == 0, found.stdout
    kinds = [record["1 rank"], record["2 ranks"]]
    assert [kind["num_runs"] for kind in kinds] == [2, 2]
    assert all(kind["num_kills"] >= 2 and kind["num_kills_resumed"] == kind["num_kills"] for kind in kinds)
    assert sum(kind["num_killed_while_writing"] for kind in kinds) >= 1
    assert [kind["problems"] for kind in kinds] == [[], []]
    assert kinds[0]["num_bit_identical"] == 2
    assert kinds[1]["max_difference"] <= 1e-6


@pytest.mark.slow
def test_training_keeps_its_descriptors_and_threads_and_its_memory(folder):
    _, record = benchmark(folder, "soak.py", "--num-steps", "150", "--every", "1", "--picture", "memory.png")
    for part in ("training", "workers"):
        assert record[part]["descriptors"]["is_flat"]
        assert record[part]["threads"]["is_flat"]
        # A copy of the model that is kept at each step would be 1,000 MiB and more.
        assert record[part]["anonymous MiB"]["slope_per_1000_steps"] < 300
    assert (folder / "memory.png").exists()
