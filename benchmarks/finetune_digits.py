"""Fine-tuning on handwritten digits: every size at once against each alone and against fresh weights.

    python benchmarks/finetune_digits.py RUN --json result.json

RUN is a run of `poa pretrain --recipe digits`; where there is none it is made (three minutes). Elastic fine-tuning
trains the family once and gives all nine sub-networks their classifier; beside it the smallest, the middle and the
intact network are fine-tuned alone, and once more from fresh weights. All with the same options, once on the 1,437
training digits and once on ten of each class; accuracies are of the last epoch on the 360 others, so that no figure is
chosen by them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine

from poa.config import DataConfig, ElasticConfig, FinetuneConfig, FitConfig, RuntimeConfig, load_recipe, to_dict
from poa.data import open_labelled
from poa.models import open_models
from poa.randomness import generator
from poa.runtime import Runtime, resolve_runtime
from poa.tasks.classify import ClassificationData, FinetuneTask, classification_data
from poa.tasks.elastic import ElasticFinetuneTask
from poa.tasks.fit import fit
from poa.timm_models import is_family
from poa.train import ConsoleReporter, pretrain

IMAGES = FinetuneConfig(
    mixup=0.2, cutmix=0.0, mix_prob=0.5, crop_scale=(0.7, 1.0), aspect=(0.9, 1.1), flip_prob=0.0, randaugment_ops=0
)
FIT = FitConfig(lr=3e-3, layer_decay=0.9, ema_decay=0.99)
LABELS = {"all": (None, 15), "10 per class": (10, 120)}
"""Training images of each class, and epochs."""


def digits(per_class: int | None, seed: int) -> ClassificationData:
    """The digits; of the training digits `per_class` of each class, drawn from the seed, or all."""
    train, test = (open_labelled(spec, DataConfig(), 1) for spec in ("digits:train", "digits:test"))
    if per_class is not None:
        order = generator(seed, "few labels").permutation(len(train))
        members = [order[train.targets[order] == label][:per_class] for label in range(10)]
        train = train.at(np.sort(np.concatenate(members)))
    return classification_data(train, test)


def elastic(run: str, data: ClassificationData, settings: FitConfig, runtime: Runtime) -> dict[str, float]:
    """The accuracy of every sub-network of the family fine-tuned once."""
    task = ElasticFinetuneTask(open_models([run], ["intact"])[0], data, IMAGES, ElasticConfig(), settings)
    fit(task, settings, runtime)
    found = task.measure(task.model, runtime.device, task.family.subnets)
    return {str(subnet): figures["accuracy"] for subnet, figures in found.items()}


def alone(
    run: str, data: ClassificationData, settings: FitConfig, runtime: Runtime, *, untrained: bool
) -> dict[str, float]:
    """The accuracies of the smallest, the middle and the intact network, each fine-tuned alone."""
    names = ["smallest", "middle", "intact"]
    found = {}
    for candidate in open_models([run], names, untrained_seed=settings.seed if untrained else None):
        task = FinetuneTask(candidate, data, IMAGES, settings)
        found[candidate.name.removesuffix(" untrained")] = fit(task, settings, runtime).best["accuracy"]
    return found


def summary(runs: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and deviation over the seeds, and the figures themselves."""
    runs = list(runs)
    return {
        name: {
            "mean": statistics.mean(each[name] for each in runs),
            "sd": statistics.stdev(each[name] for each in runs) if len(runs) > 1 else 0.0,
            "each": [each[name] for each in runs],
        }
        for name in runs[0]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of `poa pretrain --recipe digits`; made where it is not there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    if not is_family(options.run):
        pretrain(load_recipe("digits"), options.run, ConsoleReporter())
    runtime = resolve_runtime(RuntimeConfig(device="cpu", num_workers=0, num_threads=1))
    results = {}
    for labels in LABELS:
        results[labels] = measured(str(options.run), labels, options.seeds, runtime)
        show(labels, results[labels])
    if options.json:
        write(options, results)
    return 0


def measured(run: str, labels: str, num_seeds: int, runtime: Runtime) -> dict[str, Any]:
    """Accuracies and CPU seconds of the three ways, over the seeds."""
    per_class, epochs = LABELS[labels]
    kinds: dict[str, list[dict[str, float]]] = {"elastic": [], "alone": [], "from scratch": []}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for seed in range(num_seeds):
        settings = replace(FIT, seed=seed, epochs=epochs, evaluate_every=epochs, warmup_epochs=epochs / 10)
        data = digits(per_class, seed)
        for name, found in kinds.items():
            start = time.process_time()
            if name == "elastic":
                found.append(elastic(run, data, settings, runtime))
            else:
                found.append(alone(run, data, settings, runtime, untrained=name == "from scratch"))
            seconds[name].append(round(time.process_time() - start, 1))
    accuracy = {name: summary(found) for name, found in kinds.items()}
    return {"epochs": epochs, "accuracy": accuracy, "cpu_seconds": seconds}


def show(labels: str, results: dict[str, Any]) -> None:
    accuracy, seconds = results["accuracy"], results["cpu_seconds"]
    print(f"{labels:<14}" + "".join(f"{name:>18}" for name in accuracy))
    for subnet in accuracy["elastic"]:
        cells = (found.get(subnet) for found in accuracy.values())
        shown = ("" if each is None else f"{each['mean']:.1%} ± {each['sd']:.1%}" for each in cells)
        print(f"{subnet:<14}" + "".join(f"{text:>18}" for text in shown))
    print(f"{'CPU seconds':<14}" + "".join(f"{statistics.mean(each):>18.0f}" for each in seconds.values()), flush=True)


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    value = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/finetune_digits.py RUN --seeds {options.seeds}",
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "options": {"images": to_dict(IMAGES), "fit": to_dict(FIT), "elastic": to_dict(ElasticConfig())},
        "num_test": 360,
        "labels": results,
    }
    options.json.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
