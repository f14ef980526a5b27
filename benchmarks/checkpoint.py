"""How long a checkpoint holds the training up, against writing it while the training waits.

    python benchmarks/checkpoint.py                     # prints a table
    python benchmarks/checkpoint.py --json result.json  # and writes the figures

The state is 300 MB of random float32 tensors in CPU memory, as many as a ViT-S has with its teacher and optimiser. In
every round one checkpoint is written beside the training and one while it waits, so both see the same machine. "Held
up" is the time until `save` comes back; the first is apart, because its memory is fresh. While the one beside the
training is written, matrix products run in the foreground; their rate is compared with that just before. Verifying
reads every byte and checks its SHA-256.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from machine import describe_machine

from poa.train.checkpoint import CheckpointStore

NUM_TENSORS = 750
SIDE = 512


def make_state(megabytes: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    size = megabytes * 1_000_000 // (4 * NUM_TENSORS)
    state = {f"tensor.{number}": torch.randn(size, generator=rng) for number in range(NUM_TENSORS)}
    return state | {f"step.{number}": torch.tensor(1.0) for number in range(NUM_TENSORS // 3)}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products_per_second(factors: list[torch.Tensor], goes_on: Callable[[int], bool]) -> float:
    start, done = time.perf_counter(), 0
    while goes_on(done):
        torch.mm(*factors)
        done += 1
    return done / (time.perf_counter() - start)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    state = make_state(arguments.megabytes)
    factors = [torch.randn(SIDE, SIDE) for _ in range(2)]
    store = CheckpointStore(folder, keep=1)
    first = seconds(lambda: store.save(0, state, {}))
    check(store)
    found: dict[str, list[float]] = {
        name: [] for name in ("held_up", "synchronous", "share_of_speed", "verify", "load")
    }
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for number in range(arguments.rounds):
        alone = products_per_second(factors, lambda done: done < 100)
        found["held_up"].append(seconds(lambda number=number: store.save(2 * number + 1, state, {})))
        beside = products_per_second(factors, lambda done: done < 1 or store.is_writing)
        found["share_of_speed"].append(beside / alone)
        check(store)
        found["synchronous"].append(seconds(lambda number=number: store.save(2 * number + 2, state, {}, wait=True)))
        check(store)
        found["verify"].append(seconds(store.newest))
        checkpoint = store.newest()
        found["load"].append(seconds(lambda checkpoint=checkpoint: checkpoint.load_(target)))
    ratios = [held / whole for held, whole in zip(found["held_up"], found["synchronous"], strict=True)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/checkpoint.py " + " ".join(sys.argv[1:]),
        "machine": {**describe_machine(), "num_threads": torch.get_num_threads()},
        "megabytes": sum(tensor.nbytes for tensor in state.values()) / 1e6,
        "held_up_first_seconds": first,
        "held_up_seconds": spread(found["held_up"]),
        "synchronous_seconds": spread(found["synchronous"]),
        "held_up_share": spread(ratios),
        "foreground_speed_share": spread(found["share_of_speed"]),
        "verify_seconds": spread(found["verify"]),
        "load_seconds": spread(found["load"]),
    }


def check(store: CheckpointStore) -> None:
    problem = store.wait()
    if problem is not None:
        sys.exit(problem)


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1], "num": len(ordered)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary directory if left out")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments)
    for name, value in result.items():
        print(f"{name:26} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
