"""Kills runs with SIGKILL at random moments, lets them go on, and compares what comes out with runs left alone.

    python benchmarks/kill_runs.py                                  # 50 runs, prints a table
    python benchmarks/kill_runs.py --num-runs 6 --json result.json  # fewer, and writes the figures

Half of the runs have one process, half have two under torchrun. Each is a tiny run on handwritten digits that is killed
one to three times: while it starts, at any moment of any step, or while a checkpoint is being written (its scratch
directory is there). Of two processes either one is killed, and torchrun starts both again, or all are with torchrun. In
the end it must have gone on, each time from the newest checkpoint that was complete, to the weights of the run that
was left alone. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from machine import describe_machine
from safetensors.torch import load_file

from poa.cli.main import main as poa
from poa.files import write_json
from poa.randomness import generator

NUM_STEPS = 40
CONFIG = """
model: {widths: [16, 32], depths: [1, 2], head_dim: 16, drop_path: 0.2}
heads: {num_prototypes: [16, 32], hidden_dim: 32, bottleneck_dim: 16}
augment: {num_local_crops: 2}
optim: {warmup_epochs: 0.2}
train: {epochs: 0.91, batch_size: 32, checkpoint_every: 3, log_every: 1}
monitor: {every: 0}
runtime: {num_workers: 0, num_threads: 1, device: cpu}
"""
WEIGHTS = "run/family/weights.safetensors"
MAX_KILLS = 3
MAX_SECONDS = 600
POLL_SECONDS = 0.0005
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["poa.train", "poa.cli.pretrain", "torch.utils.tensorboard"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(MAX_KILLS))


class Kill(NamedTuple):
    """When to kill.

    Attributes:
        aim: "start", "step" or "writing".
        where: which part of what is left of the run is waited for, in [0, 1).
        delay: seconds to wait then.
    """

    aim: str
    where: float
    delay: float


class Case(NamedTuple):
    """A run and how it is killed; `victim` is a rank, or None for all processes."""

    index: int
    num_ranks: int
    victim: int | None
    kills: tuple[Kill, ...]


class Death(NamedTuple):
    """What a kill left behind.

    Attributes:
        aim: as of the `Kill`.
        done: steps done.
        complete: the step of the newest complete checkpoint.
        was_writing: whether a part of one was there.
        num_begun: how often the run had begun with its steps.
    """

    aim: str
    done: int
    complete: int
    was_writing: bool
    num_begun: int


def make_case(seed: int, index: int) -> Case:
    rng = generator(seed, "kill", index)
    num_ranks = 1 + index % 2
    victim = None if num_ranks == 1 or index // 2 % 2 else index // 4 % 2
    delays = {"start": 1.0, "step": 0.05, "writing": 0.004}
    aims = rng.choice(list(delays), size=rng.integers(1, MAX_KILLS + 1), p=(0.15, 0.35, 0.5)).tolist()
    kills = tuple(Kill(aim, float(rng.random()), float(rng.uniform(0, delays[aim]))) for aim in aims)
    return Case(index, num_ranks, victim, kills)


class Run:
    """A run in a directory of its own, in processes that can be killed."""

    def __init__(self, folder: Path, num_ranks: int, index: int) -> None:
        self.folder = folder
        self.num_ranks = num_ranks
        self.out = folder / "run"
        self.log = folder / "log"
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        workers = str(index // 2 % 2) if num_ranks == 1 else "0"
        options = ("--runtime.num-workers", workers)
        self.command = ("pretrain", "--recipe", "digits", "--config", "config.yaml", "--out", "run", *options)
        self.start()

    def start(self) -> None:
        """Starts it, or lets it go on."""
        self.num_starts = self.num_overviews()
        if self.num_ranks == 1:
            self.forked = SERVER.Process(target=child, args=(list(self.command), str(self.folder)))
            self.forked.start()
        else:
            with self.log.open("ab") as log:
                command = (sys.executable, *TORCHRUN, "-m", "poa", *self.command)
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                self.torchrun = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)

    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self.forked.exitcode if self.num_ranks == 1 else self.torchrun.poll()

    def finish(self) -> int:
        """The exit status when it has ended."""
        self.wait(lambda: False)
        return self.status() or 0

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the run ended."""
        deadline = time.monotonic() + MAX_SECONDS
        while not condition():
            if self.status() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder} hangs; its log ends with {self.text()[-2000:]}")
            time.sleep(POLL_SECONDS)
        return True

    def text(self) -> str:
        """What it has said."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def num_overviews(self) -> int:
        """How often it has begun with its steps."""
        return self.text().count("sub-networks, ")

    def has_begun(self) -> bool:
        """Whether it has begun with its steps since the last start."""
        return self.num_overviews() > self.num_starts

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, rising."""
        return sorted(int(path.name[5:]) for path in (self.out / "checkpoints").glob("step-*"))

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.out / "checkpoints").glob(".step-*"))

    def done(self) -> int:
        """Steps done, as of the last whole line of the metrics."""
        file = self.out / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def reach(self, kill: Kill) -> bool:
        """Waits for the moment; False if the run ends before."""
        if kill.aim == "start":
            time.sleep(kill.delay)
            return self.status() is None and (self.num_ranks == 1 or self.wait(lambda: len(self.ranks()) > 1))
        if not self.wait(self.has_begun):
            return False
        first = max(self.steps(), default=0)
        target = first + int(kill.where * (NUM_STEPS - first))
        if not self.wait(lambda: self.done() >= target):
            return False
        if kill.aim == "writing" and not self.wait(self.is_writing):
            return False
        time.sleep(kill.delay)
        return self.status() is None

    def kill(self, victim: int | None, aim: str) -> Death | None:
        """Kills one rank, or all processes; what is there afterwards. None if the rank had gone by itself."""
        self.num_starts = self.num_overviews()
        if victim is None:
            self.kill_all()
        elif (process := self.ranks().get(victim)) is not None:
            end(process)
        else:
            return None
        complete = max(self.steps(), default=0)
        return Death(aim, self.done(), complete, self.is_writing(), self.num_overviews())

    def kill_all(self) -> None:
        """Ends all processes that are still there."""
        if self.num_ranks == 1:
            self.forked.kill()
            self.forked.join()
        elif self.torchrun.poll() is None:
            ranks = self.ranks()
            self.torchrun.kill()
            self.torchrun.wait()
            end(*ranks.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def ranks(self) -> dict[int, int]:
        """The processes that torchrun has started, by rank."""
        found = {}
        for process in children(self.torchrun.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended meanwhile
                names = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                found |= {int(name[5:]): process for name in names if name.startswith(b"RANK=")}
        return found

    def resumed(self) -> list[int]:
        """The step after which it went on, for every time it began."""
        parts = self.text().split("sub-networks, ")[1:]
        found = [re.search(r"Resuming after step (\d+)", part) for part in parts]
        return [int(match[1]) if match else 0 for match in found]

    def weights(self) -> Path:
        """The weights of the finished family."""
        return self.folder / WEIGHTS


def child(arguments: list[str], folder: str) -> None:
    handle = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    sys.exit(poa(arguments))


def children(process: int) -> list[int]:
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in file.read_text(encoding="ascii").split()]


def end(*processes: int) -> None:
    """Kills them and waits until they are gone."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    while any(is_running(process) for process in processes):
        time.sleep(POLL_SECONDS)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def torture(case: Case, folder: Path) -> dict[str, Any]:
    """Kills a run as planned and lets it go on to its end; what happened, with what went wrong under `problems`."""
    deaths: list[Death] = []
    with Run(folder, case.num_ranks, case.index) as run:
        for kill in case.kills:
            if not run.reach(kill) or (death := run.kill(case.victim, kill.aim)) is None:
                break
            deaths.append(death)
            if case.victim is None:
                run.start()
        status = run.finish()
    resumed = run.resumed()
    # A process that is killed while it starts has not begun; the next that begins goes on for both.
    lost = [death.done - resumed[death.num_begun] for death in deaths if death.num_begun < len(resumed)]
    return {
        "index": case.index,
        "num_ranks": case.num_ranks,
        "killed": "all" if case.victim is None else f"rank {case.victim}",
        "deaths": [death._asdict() for death in deaths],
        "resumed_after": resumed[1:],
        "lost_steps": lost,
        "problems": list(problems(run, deaths, status)),
    }


def problems(run: Run, deaths: list[Death], status: int) -> Iterator[str]:
    text, resumed = run.text(), run.resumed()
    if status != 0 or not run.weights().exists():
        yield f"it ended with {status}: {text[-1000:]!r}"
    # A data worker whose process was killed may show one; there are none with two ranks.
    elif run.num_ranks > 1 and "Traceback" in text:
        yield f"it showed a traceback: {text[text.index('Traceback') :][:2000]!r}"
    if "passed over" in text:
        yield "a checkpoint was damaged"
    completes = [death.complete for death in deaths]
    if completes != sorted(completes):
        yield f"a complete checkpoint was lost: the newest were those of the steps {completes}"
    for death in deaths:
        if death.num_begun >= len(resumed) and death.done < NUM_STEPS:
            yield f"it never went on after the kill at step {death.done}"
        elif death.num_begun < len(resumed) and resumed[death.num_begun] < death.complete:
            yield f"it went on after step {resumed[death.num_begun]}, but step {death.complete} was complete"


def difference(found: Path, expected: Path) -> float:
    """The largest difference of two families' weights; 0 only where the files are equal."""
    if sha256(found) == sha256(expected):
        return 0.0
    left, right = load_file(found), load_file(expected)
    return max(*(float((left[name] - right[name]).abs().max()) for name in left), sys.float_info.min)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    deaths = [death for result in results for death in result["deaths"]]
    return {
        "num_runs": len(results),
        "num_kills": len(deaths),
        "num_killed_while_starting": sum(death["aim"] == "start" for death in deaths),
        "num_killed_while_writing": sum(death["was_writing"] for death in deaths),
        "num_kills_resumed": sum(len(result["lost_steps"]) for result in results),
        "max_lost_steps": max((lost for result in results for lost in result["lost_steps"]), default=0),
        "num_bit_identical": sum(result["difference"] == 0.0 for result in results),
        "max_difference": max((result["difference"] or 0.0 for result in results), default=0.0),
        "problems": [problem for result in results for problem in result["problems"]],
    }


def left_alone(num_ranks: int, folder: Path) -> Path:
    """The weights of a run that nothing happens to."""
    with Run(folder, num_ranks, 0) as run:
        if run.finish() != 0:
            raise RuntimeError(f"a run that was left alone failed: {run.text()}")
    return run.weights()


def kill_runs(num_runs: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Kills that many runs in turn, with one and two processes by turns; what happened to each."""
    cases = [make_case(seed, index) for index in range(num_runs)]
    whole = {num: left_alone(num, folder / f"left-alone-{num}") for num in {case.num_ranks for case in cases}}
    results = []
    for case in cases:
        found = torture(case, folder / f"run-{case.index}")
        weights = folder / f"run-{case.index}" / WEIGHTS
        found["difference"] = difference(weights, whole[case.num_ranks]) if weights.exists() else None
        if case.num_ranks == 1 and found["difference"] != 0:
            found["problems"].append(f"its weights differ by {found['difference']}")
        results.append(found)
        kills = ", ".join(f"{death['aim']} at step {death['done']}" for death in found["deaths"]) or "never"
        whom = "its process" if case.num_ranks == 1 else f"{found['killed']} of 2"
        print(f"run {case.index}, {whom} killed: {kills}; {found['problems'] or 'good'}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    SERVER.set_forkserver_preload(PRELOADED)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = kill_runs(arguments.num_runs, arguments.seed, Path(scratch))
    parts = {f"{num} rank{'s' * (num > 1)}": [r for r in results if r["num_ranks"] == num] for num in (1, 2)}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/kill_runs.py " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "seconds": time.monotonic() - start,
        **{name: summary(part) for name, part in parts.items()},
        "runs": results,
    }
    for name in parts:
        print(name, json.dumps(record[name], indent=2))
    if arguments.json:
        write_json(arguments.json, record)
    return 1 if any(result["problems"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
