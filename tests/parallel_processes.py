"""Processes that train together, beside one that trains alone, and what comes out."""

import os
import signal
import socket
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from poa.config import MonitorConfig, ParallelConfig, PretrainConfig
from poa.distributed import Ranks, process_group
from poa.train import Reporter, pretrain
from poa.train.checkpoint import CheckpointStore
from poa.train.metrics import read_metrics
from poa.train.run_directory import RunDirectory
from tests.parallel_runs import Case, Outcome, digits, objective_differences, train, train_by_hand

# Whole runs, that stop and go on.


@dataclass(frozen=True)
class Leg:
    """A part of a run: by how many processes, how, and the step at which it is stopped; 0 runs to the end."""

    num_ranks: int
    mode: str = "ddp"
    last_step: int = 0


class _StopAt(Reporter):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, done: int, loss: float, images_per_second: float | None) -> None:
        del loss, images_per_second
        if done == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


def run_config(case: Case) -> PretrainConfig:
    """The same for `pretrain`, as long, with a monitor."""
    steps_per_epoch = len(digits()) // case.batch_size
    train = replace(case.config.train, epochs=case.num_steps / steps_per_epoch)
    return replace(case.config, train=train, monitor=MonitorConfig(every=4, num_images=40, collapse_rank=1.0))


def run_legs(case: Case, legs: list[Leg], ports: list[int], ranks: Ranks, out: Path) -> None:
    """Runs one leg after the other into `out`; every process calls it, those that a leg does not need pass on."""
    for leg, port in zip(legs, ports, strict=True):
        if ranks.rank < leg.num_ranks:
            with Environment(Ranks(ranks.rank, leg.num_ranks, ranks.rank, leg.num_ranks), port):
                config = replace(run_config(case), parallel=ParallelConfig(leg.mode))
                result = pretrain(config, out, _StopAt(leg.last_step))
            # Several processes see a signal in the step after it.
            expected = {leg.last_step, leg.last_step + 1} if leg.last_step else {case.num_steps}
            assert result.step in expected, (leg, result)


def outcome_of_run(case: Case, out: Path) -> Outcome:
    """What a whole run left behind, from its metrics and its last checkpoint."""
    checkpoint = CheckpointStore(RunDirectory(out).checkpoints, keep=1).newest()
    assert checkpoint is not None
    assert checkpoint.step == case.num_steps
    tensors = {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in checkpoint.tensors.items()}
    checkpoint.load_(tensors)
    losses = [_figures(line) for line in read_metrics(out)]
    return Outcome(losses, {}, {name: part for name, part in tensors.items() if part.numel() > 1})


def _figures(line: dict[str, Any]) -> dict[str, float]:
    """Losses and gradient norms, or what the monitor saw, of a line of the metrics."""
    if "monitor" not in line:
        return {name: value for name, value in line.items() if name.startswith(("loss", "grad_norm"))}
    return {f"{subnet} {name}": value for subnet, seen in line["monitor"].items() for name, value in seen.items()}


# Starting the processes.


class Environment:
    """Within, the variables that torchrun sets; none for a single process."""

    def __init__(self, ranks: Ranks, port: int) -> None:
        self.values = {
            "RANK": str(ranks.rank),
            "WORLD_SIZE": str(ranks.num_ranks),
            "LOCAL_RANK": str(ranks.rank),
            "LOCAL_WORLD_SIZE": str(ranks.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.is_alone = ranks.num_ranks == 1

    def __enter__(self) -> None:
        for name, value in self.values.items():
            os.environ.pop(name, None) if self.is_alone else os.environ.update({name: value})

    def __exit__(self, *_: object) -> None:
        for name in self.values:
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Work:
    """What a set of processes does: trainings, runs of several legs, and the functions of the objective."""

    cases: tuple[Case, ...] = ()
    runs: tuple[tuple[Case, tuple[Leg, ...]], ...] = ()


@dataclass
class Found:
    """What came out.

    Attributes:
        differences: of each training and run from what one process does, on each process.
        objective: those of the functions that processes compute together, on each process.
        outcomes: of each training, on the main process.
        alone: what one process did.
    """

    differences: dict[Any, list[dict[str, float]]]
    objective: list[dict[str, float]]
    outcomes: dict[Case, Outcome]
    alone: dict[Case, Outcome]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _work_of_rank(rank: int, num_ranks: int, work: Work, ports: list[int], out: str) -> None:
    torch.set_num_threads(1)
    folder, ranks = Path(out), Ranks(rank, num_ranks, rank, num_ranks)
    unshared = {case.alone for case in work.cases if case.draws != "shared"}
    alone_cases = list(dict.fromkeys([case.alone for case in work.cases]))
    own = {}
    for case in alone_cases[rank::num_ranks]:
        own[case] = train_by_hand(case, num_ranks) if case in unshared else train(case)
    torch.save(own, folder / f"alone-{rank}.pt")
    for index, (case, _) in list(enumerate(work.runs))[rank::num_ranks]:
        pretrain(run_config(case.alone), folder / f"alone-run-{index}")
    with Environment(ranks, ports[0]), process_group(ranks, torch.device("cpu")):
        outcomes = {case: train(case, ranks) for case in work.cases}
        objective = objective_differences(ranks)
    rest = ports[1:]
    for index, (case, legs) in enumerate(work.runs):
        run_legs(case, list(legs), rest[: len(legs)], ranks, folder / f"run-{index}")
        rest = rest[len(legs) :]
    torch.save((outcomes, objective), folder / f"together-{rank}.pt")


def run_work(num_ranks: int, work: Work) -> Found:
    """Does it on that many processes, and by one process what it is compared with."""
    ports = _free_ports(1 + sum(len(legs) for _, legs in work.runs))
    with tempfile.TemporaryDirectory() as out:
        torch.multiprocessing.spawn(_work_of_rank, (num_ranks, work, ports, out), num_ranks)
        folder = Path(out)
        alone: dict[Case, Outcome] = {}
        for rank in range(num_ranks):
            alone |= torch.load(folder / f"alone-{rank}.pt", weights_only=False)
        together = [torch.load(folder / f"together-{rank}.pt", weights_only=False) for rank in range(num_ranks)]
        differences: dict[Any, list[dict[str, float]]] = {
            case: [outcomes[case].differences(alone[case.alone]) for outcomes, _ in together] for case in work.cases
        }
        for index, (case, legs) in enumerate(work.runs):
            found, expected = (outcome_of_run(case, folder / f"{name}-{index}") for name in ("run", "alone-run"))
            differences[case, legs] = [found.differences(expected)]
        return Found(differences, [figures for _, figures in together], together[0][0], alone)


def largest(differences: list[dict[str, float]]) -> dict[str, float]:
    """The largest on any process."""
    return {name: max(each[name] for each in differences) for name in differences[0]}
