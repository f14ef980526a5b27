"""How good every sub-network of a small family is on CIFAR-10, trained and untrained: k-NN and linear probes.

    poa pretrain --recipe cifar --config benchmarks/cifar_family.yaml --data TRAIN.parquet --out RUN
    python benchmarks/cifar_family.py RUN TRAIN.parquet TEST.parquet --out SWEEP --json result.json

One sweep over all sub-networks and over the smallest, the middle and the intact one with fresh weights; stopped, it
goes on. The standard error of an accuracy on N test images, √(p (1 − p) / N), stands beside it; the pre-training has
one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from poa.config import DataConfig
from poa.data import open_source
from poa.demo import raw_pixel_accuracy
from poa.evaluate import Evaluator, Loading, Result, split, sweep
from poa.evaluate.plots import draw_front
from poa.evaluate.registry import EVALUATORS
from poa.figures import new_figure, save_figure
from poa.models import open_models

PROTOCOLS: list[Evaluator] = [EVALUATORS["knn"](), EVALUATORS["linear"]()]


def described(result: Result, num_test: int) -> dict[str, Any]:
    """The figures of a network under a protocol, and the standard error of the accuracy."""
    error = math.sqrt(result.value * (1 - result.value) / num_test)
    kept = ("protocol", "network", "num_params", "flops", "figures")
    return {**{name: asdict(result)[name] for name in kept}, "standard_error": error}


def draw(path: Path, results: list[Result], raw: float) -> None:
    """k-NN and linear accuracy of every sub-network against its parameters."""
    figure, axes = new_figure(12, 4.5, len(PROTOCOLS))
    for axis, protocol, label in zip(axes, PROTOCOLS, ("k-NN", "linear probe"), strict=True):
        mine = [result for result in results if result.protocol == protocol.name]
        draw_front(axis, mine, {"raw pixels": raw} if protocol.name == "knn" else {}, f"{label} accuracy, %")
        axis.set_title(f"CIFAR-10, {label}")
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, required=True, help="directory of the sweep")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train, test = (open_source(spec, DataConfig(), 3) for spec in (arguments.train, arguments.test))
    networks = open_models([arguments.run])
    networks += open_models([arguments.run], ["smallest", "middle", "intact"], untrained_seed=0)
    found = sweep(PROTOCOLS, networks, split(train, test, PROTOCOLS), arguments.out, loading=Loading(batch_size=128))
    results = list(found.report.results)
    raw = raw_pixel_accuracy(train, test)
    for result in results:
        print(f"{result.protocol:<8} {result.network:<18} {result.num_params:>9,} {result.value:.1%}")
    print(f"knn      raw pixels {raw:.1%}")
    if arguments.picture:
        draw(arguments.picture, results, raw)
    if arguments.json:
        value = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {**describe_machine(), "threads": torch.get_num_threads()},
            "num_train": found.report.num_train,
            "num_test": found.report.num_test,
            "raw_pixels_knn": raw,
            "results": [described(result, found.report.num_test) for result in results],
        }
        arguments.json.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
