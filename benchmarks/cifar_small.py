"""What the recipes for 32-pixel colour images reach in minutes on one CPU thread.

    python benchmarks/cifar_small.py TRAIN.parquet TEST.parquet --recipes cifar-swin --json result.json

The parquet files have a column of encoded images and one of labels. Each recipe is pre-trained on the first, labels
unseen, into a temporary directory; then the smallest, the middle and the intact sub-network classify the second by
k-NN on the first, as do the untrained family and the pixels themselves. With --json the recipes not run keep the
figures that are there, if those are of the same machine and images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import processor

from poa.config import PretrainConfig, load_recipe
from poa.data import ImageSource, open_source
from poa.demo import raw_pixel_accuracy
from poa.evaluate import Knn, evaluate, split
from poa.family import Family, load
from poa.models import family_members
from poa.runtime import resolve_runtime
from poa.train import ConsoleReporter, pretrain
from poa.train.metrics import read_metrics
from poa.train.setup import build_trainer
from poa.version import __version__

RECIPES = {"cifar-swin": 5.0, "cifar-resnet": 3.0}
"""The recipes, and the epochs that take about eight minutes on one thread with 5,000 images."""


def settings(recipe: str, data: str, epochs: float, seed: int) -> PretrainConfig:
    """The recipe with what differs in a short run on one CPU thread."""
    config = load_recipe(recipe)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=data),
        train=dataclasses.replace(config.train, epochs=epochs, seed=seed),
        monitor=dataclasses.replace(config.monitor, every=250),
        runtime=dataclasses.replace(config.runtime, device="cpu", num_workers=0, num_threads=1),
    )


def accuracies(family: Family, train: ImageSource, test: ImageSource) -> dict[str, float]:
    """The best k-NN accuracy of the smallest, the middle and the intact sub-network."""
    subnets = family.space.parse_all(["smallest", "middle", "intact"])
    report = evaluate([Knn()], family_members(family, subnets), split(train, test, [Knn()]))
    return {result.network: result.value for result in report.results}


def measured(config: PretrainConfig, train: ImageSource, test: ImageSource) -> dict[str, Any]:
    """One run: k-NN before and after, the training curve and the time."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        pretrain(config, run, ConsoleReporter())
        seconds = time.perf_counter() - start
        family = load(run)
        lines = [line for line in read_metrics(run) if "monitor" in line]
    steps_per_epoch = len(train) // config.train.batch_size
    fresh = build_trainer(config, steps_per_epoch, resolve_runtime(config.runtime)).model.teacher.backbone
    return {
        "epochs": config.train.epochs,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "training_seconds": round(seconds, 1),
        "knn": accuracies(family, train, test),
        "knn_untrained": accuracies(Family(family.card, fresh), train, test),
        "monitor": [{"step": line["step"], **line["monitor"]} for line in lines],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="a parquet file: images to train on, which also vote in the k-NN")
    parser.add_argument("test", help="a parquet file: images to classify")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--epochs", type=float, help="instead of the few that take minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    data = load_recipe(next(iter(RECIPES))).data
    train, test = (open_source(file, data, 3, require_labels=True) for file in (options.train, options.test))
    runs = {}
    for recipe in options.recipes:
        epochs = options.epochs or RECIPES[recipe]
        found = measured(settings(recipe, options.train, epochs, options.seed), train, test)
        runs[recipe] = found | {"command": command(options, recipe, epochs)}
        print(f"{recipe}, {epochs:g} epochs in {found['training_seconds']:.0f} s")
        for name, accuracy in found["knn"].items():
            print(f"  {name:<12} {accuracy:.1%}   (untrained {found['knn_untrained'][name]:.1%})")
    raw = raw_pixel_accuracy(train, test)
    print(f"raw pixels {raw:.1%}")
    if options.json:
        conditions = {
            "machine": {
                "processor": processor(),
                "threads": 1,
                "platform": platform.platform(),
                "torch": torch.__version__,
                "poa": __version__,
            },
            "num_train": len(train),
            "num_test": len(test),
            "raw_pixels": raw,
        }
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **conditions,
            "runs": earlier_runs(options.json, conditions) | runs,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def earlier_runs(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The runs in a result that is there, if it is of the same machine and images."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    same = all(before[name] == value for name, value in conditions.items())
    return before["runs"] if same else {}


def command(options: argparse.Namespace, recipe: str, epochs: float) -> str:
    """What repeats one recipe's figures, without the machine's paths."""
    names = f"{Path(options.train).name} {Path(options.test).name}"
    return f"python benchmarks/cifar_small.py {names} --recipes {recipe} --epochs {epochs:g} --seed {options.seed}"


if __name__ == "__main__":
    sys.exit(main())
