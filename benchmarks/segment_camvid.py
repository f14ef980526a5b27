"""Does pre-training help segmentation? A family against the same networks untrained, on a folder of masks.

    python benchmarks/segment_camvid.py TRAIN_DIR TEST_DIR FAMILY --json result.json

TRAIN_DIR and TEST_DIR hold images/ and masks/, as CamVid does (Brostow et al., 2009); FAMILY is a run or family. On
each sub-network, and on the same with fresh weights, a head is trained with several seeds (of head, order, views
and fresh weights). Only the last epoch is evaluated, so the test images choose nothing. Said are the mIoU with
its spread over the seeds, how the loss falls, and the margin: the difference of the two means, and of the worst trained
seed and the best untrained one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from poa.config import FitConfig, RuntimeConfig
from poa.config.segment import SegmentConfig
from poa.figures import save_figure
from poa.models import Candidate, open_models
from poa.runtime import Runtime, resolve_runtime
from poa.tasks.segmentation.data import SegmentationData, open_segmentation
from poa.tasks.segmentation.pictures import segmentation_picture, shown_images
from poa.tasks.segmentation.task import SegmentationTask, SegmentReport, train_segmentation


def run(
    network: Candidate,
    data: SegmentationData,
    arguments: argparse.Namespace,
    config: SegmentConfig,
    fit_config: FitConfig,
    runtime: Runtime,
) -> tuple[SegmentReport, dict[str, Any]]:
    """One training: its report, and what is written down of it."""
    losses: list[float] = []
    start = time.perf_counter()
    task = SegmentationTask(network, data, arguments.head, config, fit_config)
    shown = shown_images(len(data.test), arguments.num_shown)
    report = train_segmentation(
        task, fit_config, runtime, shown=shown, on_step=lambda _done, _total, loss: losses.append(loss)
    )
    steps = task.num_steps()
    described = {
        "network": network.name,
        "seed": fit_config.seed,
        "seconds": time.perf_counter() - start,
        "loss_by_epoch": [statistics.mean(losses[at : at + steps]) for at in range(0, len(losses), steps)],
        "figures": report.figures,
    }
    first, last = described["loss_by_epoch"][0], described["loss_by_epoch"][-1]
    print(
        f"{network.name:>24}  seed {fit_config.seed}  loss {first:.3f} -> {last:.3f}  "
        f"mIoU {report.figures['miou']:.4f}  pixels {report.figures['pixel_accuracy']:.4f}  "
        f"{described['seconds']:.0f} s",
        flush=True,
    )
    return report, described


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sub-network the mIoU trained and untrained, and the margins."""
    found = []
    for name in dict.fromkeys(each["network"].removesuffix(" untrained") for each in runs):
        trained, fresh = (
            [each["figures"]["miou"] for each in runs if each["network"] == name + ending]
            for ending in ("", " untrained")
        )
        line = {"network": name}
        for kind, values in (("trained", trained), ("untrained", fresh)):
            line[kind] = {"mean": statistics.mean(values), "sd": statistics.pstdev(values), "values": values}
        line["margin"] = line["trained"]["mean"] - line["untrained"]["mean"]
        line["margin_of_worst"] = min(trained) - max(fresh)
        line["loss_falls"] = all(
            each["loss_by_epoch"][-1] < each["loss_by_epoch"][0]
            for each in runs
            if each["network"].removesuffix(" untrained") == name
        )
        found.append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("family")
    parser.add_argument("--subnets", nargs="+", default=["smallest", "intact"])
    parser.add_argument("--head", choices=["linear", "upernet"], default="linear")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--image-size", nargs=2, type=int, default=[96, 128])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--num-shown", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = SegmentConfig(image_size=tuple(arguments.image_size), channels=arguments.channels)
    runtime = resolve_runtime(RuntimeConfig(device="cpu", num_workers=0))
    start = time.perf_counter()
    data = open_segmentation(arguments.train, arguments.test, config)
    runs: list[dict[str, Any]] = []
    pictures: dict[str, Any] = {}
    for seed in range(arguments.seeds):
        fit_config = FitConfig(
            epochs=arguments.epochs, batch_size=16, lr=arguments.lr, warmup_epochs=0.5,
            evaluate_every=arguments.epochs, seed=seed,
        )  # fmt: skip
        trained = open_models([arguments.family], arguments.subnets)
        fresh = open_models([arguments.family], arguments.subnets, untrained_seed=seed)
        for network in (each for pair in zip(trained, fresh, strict=True) for each in pair):
            report, described = run(network, data, arguments, config, fit_config, runtime)
            runs.append(described)
            if not seed:
                pictures[f"{network.name}\nmIoU {report.figures['miou']:.1%}"] = report.predictions
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "head": arguments.head,
        "num_train": len(data.train),
        "num_test": len(data.test),
        "segment": asdict(config),
        "fit": asdict(fit_config),
        "seconds": time.perf_counter() - start,
        "summary": summary(runs),
        "runs": runs,
    }
    for line in found["summary"]:
        print(
            f"{line['network']}: trained {line['trained']['mean']:.4f} ± {line['trained']['sd']:.4f}, untrained "
            f"{line['untrained']['mean']:.4f} ± {line['untrained']['sd']:.4f}, margin {line['margin']:+.4f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        shown = shown_images(len(data.test), arguments.num_shown)
        save_figure(segmentation_picture(data.test, shown, pictures), arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
