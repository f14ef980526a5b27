"""Thousands of steps of the digits recipe, to see whether memory, file descriptors and threads stay as they are.

    python benchmarks/soak.py                                      # 2,000 steps, prints a table
    python benchmarks/soak.py --json soak.json --picture soak.png  # and writes the figures and a picture

Every few steps the anonymous and the resident memory, the open descriptors and the threads of the training process and
of all data workers are read from /proc (Linux only). Over the second half of the run a line is fitted to each by least
squares. Its slope's standard error is from blocks of samples, because neighbouring samples are alike. Memory counts as
flat if its slope is below 1 MiB per 1,000 steps, or not told from 0 (below twice its standard error); descriptors and
threads if the least in the last quarter is not more than in the third (on the way of a batch or a checkpoint there are
more).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from poa.config import PretrainConfig, load_recipe
from poa.figures import COLOURS, new_figure, save_figure
from poa.files import write_json
from poa.train import ConsoleReporter, pretrain

BOUND = 1.0
"""MiB per 1,000 steps."""
NUM_BLOCKS = 8
QUANTITIES = ("anonymous MiB", "resident MiB", "descriptors", "threads")


def sample(process: int) -> dict[str, float]:
    """The quantities of a process now."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    return {
        "anonymous MiB": int(status["RssAnon"].split()[0]) / 1024,
        "resident MiB": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": sum(1 for _ in (folder / "fd").iterdir()),
        "threads": int(status["Threads"]),
    }


def workers() -> list[int]:
    """The processes that this one started, and theirs."""
    found, new = [], [os.getpid()]
    while new:
        process = new.pop()
        for task in Path(f"/proc/{process}/task").iterdir():
            children = (task / "children").read_text(encoding="ascii").split()
            found += map(int, children)
            new += map(int, children)
    return found


class Sampler(ConsoleReporter):
    """Reports to the terminal, and samples after every `every` steps."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.steps: list[int] = []
        self.training: list[dict[str, float]] = []
        self.workers: list[dict[str, float]] = []

    def step(self, done: int, loss: float, images_per_second: float | None) -> None:
        """See `Reporter.step`."""
        super().step(done, loss, images_per_second)
        if done % self.every == 0:
            own, others = sample(os.getpid()), [sample(process) for process in workers()]
            self.steps.append(done)
            self.training.append(own)
            self.workers.append({name: sum(other[name] for other in others) for name in QUANTITIES})


def slope(steps: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope per 1,000 steps, and its standard error from blocks left out in turn (the jackknife)."""
    x, y = np.asarray(steps) / 1000, np.asarray(values)
    whole = np.polyfit(x, y, 1)[0]
    blocks = np.array_split(np.arange(len(x)), NUM_BLOCKS)
    others = np.array([np.polyfit(np.delete(x, block), np.delete(y, block), 1)[0] for block in blocks])
    error = np.sqrt((NUM_BLOCKS - 1) / NUM_BLOCKS * ((others - others.mean()) ** 2).sum())
    return float(whole), float(error)


def judged(steps: Sequence[int], samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """For each quantity its range in the second half of the run, its slope, and whether it is flat."""
    half = len(steps) // 2
    found = {}
    for name in QUANTITIES:
        values = [each[name] for each in samples][half:]
        per_1000, error = slope(steps[half:], values)
        quarter = len(values) // 2
        is_memory = name.endswith("MiB")
        found[name] = {
            "least": min(values),
            "greatest": max(values),
            "slope_per_1000_steps": per_1000,
            "standard_error": error,
            "is_flat": per_1000 < max(BOUND, 2 * error)
            if is_memory
            else min(values[:quarter]) >= min(values[quarter:]),
        }
    return found


def soak(num_steps: int, every: int, num_workers: int, out: Path) -> tuple[Sampler, dict[str, Any]]:
    """Runs the recipe for that many steps; the samples, and what they say of the training process and the workers."""
    recipe = load_recipe("digits")
    images_per_epoch = 1437 // recipe.train.batch_size
    config: PretrainConfig = dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, epochs=(num_steps + 0.5) / images_per_epoch),
        runtime=dataclasses.replace(recipe.runtime, num_workers=num_workers),
    )
    sampler = Sampler(every)
    pretrain(config, out, sampler)
    parts = {"training": sampler.training, "workers": sampler.workers}
    return sampler, {name: judged(sampler.steps, samples) for name, samples in parts.items()}


def picture(sampler: Sampler, path: Path) -> None:
    figure, axes = new_figure(9.0, 3.0, 2)
    for axis, samples, title in zip(axes, (sampler.training, sampler.workers), ("training", "workers"), strict=True):
        for colour, name in zip(COLOURS, QUANTITIES[:2], strict=False):
            axis.plot(sampler.steps, [each[name] for each in samples], color=colour, label=name)
        highest = max(each["resident MiB"] for each in samples)
        axis.set(title=title, xlabel="step", ylabel="MiB", ylim=(0, 1.1 * highest))
        axis.legend(frameon=False)
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=10, help="steps between two samples")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--picture", type=Path, help="where to draw the memory, as PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sampler, found = soak(arguments.num_steps, arguments.every, arguments.num_workers, Path(scratch) / "run")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/soak.py " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "num_steps": arguments.num_steps,
        **found,
        "samples": {"steps": sampler.steps, "training": sampler.training, "workers": sampler.workers},
    }
    for part, quantities in found.items():
        for name, values in quantities.items():
            change = f"{values['slope_per_1000_steps']:+.3f} ± {values['standard_error']:.3f} per 1,000 steps"
            state = "flat" if values["is_flat"] else "NOT FLAT"
            print(f"{part:<9} {name:<14} {values['least']:8.1f} to {values['greatest']:8.1f}  {change:<36} {state}")
    if arguments.json:
        write_json(arguments.json, record)
    if arguments.picture:
        picture(sampler, arguments.picture)
    return 0 if all(values["is_flat"] for part in found.values() for values in part.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
