"""Fine-tuning from a task to the files that users get."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from poa.config import FitConfig, to_dict
from poa.data import LabelledImages, SkippedImage
from poa.elastic import Subnet
from poa.files import check_writable, write_json
from poa.runtime import Runtime
from poa.tasks.classify import ClassificationTask, FinetuneTask
from poa.tasks.curves import draw_history
from poa.tasks.elastic import ElasticFinetuneTask
from poa.tasks.fit import FitResult, OnStep, fit
from poa.version import __version__

METRICS_FILE = "metrics.json"
CURVES_FILE = "curves.png"
MODEL_FOLDER = "model"
FAMILY_FOLDER = "family"


@dataclass(frozen=True)
class FinetuneReport:
    """How fine-tuning went.

    Attributes:
        result: the best figures, and those of every epoch.
        metric: the figure that marks the best epoch.
        seconds: that the training took in this process.
        skipped: images that could not be read.
        difference: between the written model's logits and the trained one's, relative; None of a family.
        subnets: of a family the figures of its sub-networks with the shared classifier.
    """

    result: FitResult
    metric: str
    seconds: float
    skipped: tuple[SkippedImage, ...]
    difference: float | None = None
    subnets: Mapping[Subnet, dict[str, float]] | None = None


def finetune(
    task: FinetuneTask, config: FitConfig, runtime: Runtime, out: Path, on_step: OnStep | None = None
) -> FinetuneReport:
    """Trains the task's network and writes it to `out/model`, the figures to `metrics.json`, a picture to `curves.png`.

    A run that is in `out` goes on; see `fit`.

    Raises:
        NotFiniteError, CheckpointError: see `fit`.
        DataError: too many images cannot be read.
        ExtractionError: see `FinetuneTask.save`.
    """
    report = _trained(task, config, runtime, out, on_step)
    described = _described(task, config, runtime, report)
    report = replace(report, difference=task.save(out / MODEL_FOLDER, described))
    write_json(out / METRICS_FILE, {**described, "history": list(report.result.history)})
    return report


def finetune_family(
    task: ElasticFinetuneTask,
    config: FitConfig,
    runtime: Runtime,
    out: Path,
    subnets: Sequence[Subnet],
    on_step: OnStep | None = None,
) -> FinetuneReport:
    """Trains the task's family and writes it to `out/family` with its classifier; the rest as `finetune`.

    Args:
        task: what is learnt.
        config: the training.
        runtime: where it computes.
        out: the directory.
        subnets: those that are measured at the end.
        on_step: see `fit`.

    Raises:
        NotFiniteError, CheckpointError: see `fit`.
        DataError: too many images cannot be read.
    """
    report = _trained(task, config, runtime, out, on_step)
    report = replace(report, subnets=task.measure(task.model, runtime.device, subnets))
    described = _described(task, config, runtime, report)
    task.result(described).save(out / FAMILY_FOLDER, overwrite=True)
    found = [
        {"subnet": str(subnet), "num_params": task.family.card.num_params(subnet), **figures}
        for subnet, figures in (report.subnets or {}).items()
    ]
    write_json(out / METRICS_FILE, {**described, "subnets": found, "history": list(report.result.history)})
    return report


def _trained(
    task: ClassificationTask, config: FitConfig, runtime: Runtime, out: Path, on_step: OnStep | None
) -> FinetuneReport:
    check_writable(out / METRICS_FILE)
    start = time.perf_counter()
    result = fit(task, config, runtime, out=out, on_step=on_step)
    seconds = time.perf_counter() - start
    draw_history(result.history, task.metric, result.best_epoch, out / CURVES_FILE)
    skipped = (*task.skipped_train.found.values(), *task.skipped_test.found.values())
    return FinetuneReport(result, task.metric, seconds, skipped)


def _described(task: ClassificationTask, config: FitConfig, runtime: Runtime, report: FinetuneReport) -> dict[str, Any]:
    data = task.data
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "poa": __version__,
        "torch": torch.__version__,
        **task.describe(),
        "preprocessing": to_dict(task.how),
        "data": {
            "train": _images(data.train),
            "test": _images(data.test),
            "classes": list(data.class_names),
            "multi_label": data.is_multi_label,
            "skipped": [bad._asdict() for bad in report.skipped],
        },
        "options": {"finetune": to_dict(task.config), "fit": to_dict(config)},
        "runtime": runtime.describe(),
        "seconds": round(report.seconds, 1),
        "metric": report.metric,
        "best_epoch": report.result.best_epoch,
        "best": report.result.best,
    }


def _images(images: LabelledImages) -> dict[str, Any]:
    found = {"source": images.source.spec, "num_images": len(images), "fingerprint": images.source.fingerprint}
    return found | ({"num_without_label": images.num_without_label} if images.is_multi_label else {})
