"""Detection of blood cells (BCCD): a family's sub-networks against the same with fresh weights.

    python benchmarks/detect_bccd.py IMAGES FAMILY --threads 1 --json result.json

IMAGES holds train.json, test.json and the folders train and test with BCCD's images of 640×480 pixels; FAMILY is a
run or family directory. Every sub-network named gets a Faster R-CNN, once with the family's weights and once with fresh
ones, for each seed: of the detector's fresh weights, the order, the views and the network's fresh weights. Once only
the detector is trained (frozen), once all of it (tuned). The figures are of the last epoch on the test images; the
margin is the difference between the two of a seed, its spread the standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from poa.config import DetectConfig, FitConfig, RuntimeConfig, to_dict
from poa.models import open_models
from poa.runtime import Runtime, resolve_runtime
from poa.tasks.detection import CocoDataset, DetectionData, train_detection

DETECT = DetectConfig(
    image_size=(144, 192),
    anchor_scale=6.0,
    anchor_ratios=(1.0,),
    channels=32,
    head_channels=128,
    num_proposals=200,
    regions_per_image=64,
    drop_path=0.0,
)
FIT = FitConfig(epochs=4, batch_size=4, lr=3e-3, warmup_epochs=0.5, layer_decay=0.9, evaluate_every=4)
SETTINGS = {"frozen": replace(FIT, freeze=True), "tuned": FIT}


def trained(
    spec: str, subnet: str, data: DetectionData, settings: FitConfig, runtime: Runtime, *, fresh: bool
) -> dict[str, Any]:
    """The figures, the mean loss of the first and the last epoch, and the seconds of one training."""
    (network,) = open_models([spec], [subnet], untrained_seed=settings.seed if fresh else None)
    losses: list[float] = []
    report = train_detection(
        network, data, DETECT, settings, runtime, on_step=lambda _done, _total, loss: losses.append(loss)
    )
    steps = len(losses) // settings.epochs
    return {
        "network": subnet,
        "num_params": network.num_params,
        "fresh": fresh,
        "seed": settings.seed,
        "loss_first_epoch": statistics.mean(losses[:steps]),
        "loss_last_epoch": statistics.mean(losses[-steps:]),
        "seconds": report.seconds,
        **report.figures,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation, smallest and largest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": deviation, "min": min(values), "max": max(values)}


def summary(runs: list[dict[str, Any]], figure: str) -> dict[str, dict[str, float]]:
    """The figure with the family's weights, with fresh ones, and the margin of a seed."""
    pairs = [
        (one[figure], other[figure])
        for one in runs
        for other in runs
        if one["seed"] == other["seed"] and not one["fresh"] and other["fresh"]
    ]
    trained_ones, fresh_ones = (list(values) for values in zip(*pairs, strict=True))
    margins = [one - other for one, other in pairs]
    return {"family": spread(trained_ones), "fresh": spread(fresh_ones), "margin": spread(margins)}


def line_of(run: dict[str, Any]) -> str:
    """A training in one line."""
    return (
        f"{run['network']} {'fresh ' if run['fresh'] else 'family'} seed {run['seed']}: loss "
        f"{run['loss_first_epoch']:.3f} to {run['loss_last_epoch']:.3f}, AP {run['AP']:.3f}, AP50 {run['AP50']:.3f}, "
        f"{run['seconds']:.0f} s"
    )


def worded(part: tuple[str, dict[str, float]]) -> str:
    """Mean and spread in per cent."""
    name, values = part
    low, high = 100 * values["min"], 100 * values["max"]
    return f"{name} {100 * values['mean']:.1f} ± {100 * values['sd']:.1f} ({low:.1f} to {high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("family")
    parser.add_argument("--subnets", nargs="+", default=["smallest", "intact"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runtime = resolve_runtime(RuntimeConfig(arguments.device, num_workers=0, num_threads=arguments.threads))
    files = [(arguments.images / f"{name}.json", arguments.images / name) for name in ("train", "test")]
    data = DetectionData(*(CocoDataset(*pair, DETECT) for pair in files))
    names = [network.name for network in open_models([arguments.family], arguments.subnets)]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe_machine(), **runtime.describe(), "threads": torch.get_num_threads()},
        "detect": to_dict(DETECT),
        "fit": to_dict(FIT),
        "settings": {},
    }
    for setting in arguments.settings:
        for name in names:
            runs = []
            for seed in arguments.seeds:
                settings = replace(SETTINGS[setting], seed=seed)
                for fresh in (False, True):
                    runs.append(trained(arguments.family, name, data, settings, runtime, fresh=fresh))
                    print(setting, line_of(runs[-1]), flush=True)
            figures = {figure: summary(runs, figure) for figure in ("AP", "AP50")}
            print(setting, name, "AP50 in %:", ", ".join(map(worded, figures["AP50"].items())), flush=True)
            found["settings"].setdefault(setting, {})[name] = {**figures, "runs": runs}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
