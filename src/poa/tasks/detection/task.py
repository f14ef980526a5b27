"""Detection as a task of `poa.tasks.fit`, and the whole of it in one call."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poa.config import DetectConfig, FitConfig
from poa.data import make_loader
from poa.errors import CheckpointError, DataError, PoaWarning
from poa.models import Candidate
from poa.runtime import Runtime
from poa.tasks.detection.data import CocoDataset, DetectionBatch, MeasuredImages, TrainingBatches
from poa.tasks.detection.metrics import CocoMetric, comparable
from poa.tasks.detection.model import Detector, build_detector
from poa.tasks.fit import STATE_FOLDER, FitResult, OnStep, Task, fit
from poa.tasks.state import read_state, write_state

DETECTOR_FOLDER = "detector"


class DetectionData:
    """What is trained on and measured on.

    Args:
        train: what is trained on.
        test: what the figures are of.
        val: what the best epoch is chosen on; by default the test images, which is fair only between networks.

    Raises:
        DataError: they have other classes, or were opened for other images.
    """

    def __init__(self, train: CocoDataset, test: CocoDataset, val: CocoDataset | None = None) -> None:
        self.train, self.test, self.val = train, test, val or test
        for other in (self.val, test):
            if other.class_names != train.class_names:
                raise DataError(
                    "all annotations must have the same categories in the same order of their ids; "
                    f"{train.name} has {', '.join(train.class_names)}, {other.name} has {', '.join(other.class_names)}."
                )
            if (other.num_channels, other.has_masks) != (train.num_channels, train.has_masks):
                raise DataError(f"{train.name} was opened for {_kind(train)}, {other.name} for {_kind(other)}.")
        unseen = [name for name, number in train.num_objects().items() if not number]
        if unseen:
            warnings.warn(
                f"{train.name} has no object of {', '.join(unseen)}: these classes cannot be learnt.",
                PoaWarning,
                stacklevel=2,
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label, counted from 0."""
        return self.train.class_names

    @property
    def fingerprint(self) -> str:
        """Changes when the annotations do."""
        return " ".join(part.fingerprint for part in (self.train, self.val, self.test))


class DetectionTask(Task):
    """Finding objects, and their masks where `config.masks` asks for them; the best epoch is that of largest `AP`.

    Args:
        candidate: the network, of which a copy is trained.
        data: the images.
        config: the detector.
        batch_size: images of a step.
        seed: of fresh weights, order and views.
        num_workers: processes that decode.

    Raises:
        DataError: the data were opened for other images than the network takes, or a library is not installed.
        ConfigError: the network cannot take images of that size.
    """

    metric = "AP"

    def __init__(
        self,
        candidate: Candidate,
        data: DetectionData,
        config: DetectConfig,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        how = candidate.preprocessing
        if (data.train.num_channels, data.train.has_masks) != (how.num_channels, config.masks):
            raise DataError(
                f"{data.train.name} was opened for {_kind(data.train)}; {candidate.name} needs "
                f"{_words(how.num_channels, config.masks)}."
            )
        self.model: Detector = build_detector(candidate, len(data.class_names), config, seed)
        self.data = data
        self.batch_size, self.num_workers = batch_size, num_workers
        fill = [round(255 * value) for value in how.per_channel(how.mean)]
        self.training = TrainingBatches(data.train, config, fill, batch_size, seed)
        self.identity = f"detection {candidate.fingerprint} {data.fingerprint} {config}"
        self._new_metric()

    def _new_metric(self) -> CocoMetric:
        return CocoMetric(self.data.class_names, masks=self.data.test.has_masks)

    def num_steps(self) -> int:
        """See `Task.num_steps`; the last step of an epoch may have fewer images."""
        return len(self.training)

    def batches(self, epoch: int) -> Iterator[DetectionBatch]:
        """See `Task.batches`."""
        first = epoch * self.num_steps()
        pin_memory = torch.cuda.is_available()
        return iter(make_loader(self.training, first, first + self.num_steps(), self.num_workers, pin_memory))

    def loss(self, model: nn.Module, batch: DetectionBatch, device: torch.device) -> dict[str, Tensor]:
        """See `Task.loss`: of proposals (`objectness`, `rpn_box_reg`), of the heads, and of masks."""
        images = batch.images.to(device, non_blocking=True).float() / 255.0
        targets = [{name: value.to(device) for name, value in target.items()} for target in batch.targets]
        losses: dict[str, Tensor] = model(list(images), targets)
        return {name.removeprefix("loss_"): value for name, value in losses.items()}

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """See `Task.evaluate`: the figures of `CocoMetric` on the validation images at their own size."""
        return self.measure(model, self.data.val, device)

    @torch.inference_mode()
    def measure(self, model: nn.Module, dataset: CocoDataset, device: torch.device) -> dict[str, float]:
        """The figures of `CocoMetric` on the images at their own size; the model is in evaluation mode."""
        metric = self._new_metric()
        items = iter(make_loader(MeasuredImages(dataset), 0, len(dataset), self.num_workers, pin_memory=False))
        for start in range(0, len(dataset), self.batch_size):
            indices = range(start, min(start + self.batch_size, len(dataset)))
            images = [next(items).to(device).float() / 255.0 for _ in indices]
            for index, found in zip(indices, model(images), strict=True):
                metric.add(comparable(found), dataset.truth(index))
        return metric.figures()


@dataclass(frozen=True)
class DetectionReport:
    """A trained detector and how it came to be.

    Attributes:
        network: the candidate's name.
        model: with the weights of its best epoch, in evaluation mode.
        class_names: by label; the model's labels are one more, 0 is its background.
        figures: of the test images, see `CocoMetric.figures`.
        result: the figures of the validation images, for every epoch that was evaluated.
        seconds: that the training took in the process that ended it.
        was_there: whether it was trained before, by an earlier call with the same `out`.
    """

    network: str
    model: Detector
    class_names: tuple[str, ...]
    figures: dict[str, float]
    result: FitResult
    seconds: float
    was_there: bool = False


def train_detection(
    candidate: Candidate,
    data: DetectionData,
    config: DetectConfig,
    fit_config: FitConfig,
    runtime: Runtime,
    out: Path | None = None,
    on_step: OnStep | None = None,
) -> DetectionReport:
    """Trains a detector on a copy of the candidate's network and measures it on the test images.

    With `out`, a stopped run goes on where it was after its last epoch, and one that ended is read from
    `out/detector`: weights and figures, verified.

    Args:
        candidate: the network; it stays as it is.
        data: the images.
        config: the detector.
        fit_config: the training.
        runtime: device, precision, workers.
        out: a directory of this network and these numbers alone.
        on_step: told of every step: steps done, steps of the whole run, loss.

    Raises:
        DataError: see `DetectionTask`.
        ConfigError: see `DetectionTask`.
        NotFiniteError: the loss is no longer a finite number.
        CheckpointError: `out` holds another run, or a damaged one.
    """
    task = DetectionTask(
        candidate,
        data,
        config,
        batch_size=fit_config.batch_size,
        seed=fit_config.seed,
        num_workers=runtime.num_workers,
    )
    if out is not None and (known := _read(out / DETECTOR_FOLDER, task, candidate, fit_config)) is not None:
        known.model.to(runtime.device)
        return known
    start = time.perf_counter()
    result = fit(task, fit_config, runtime, out=out, on_step=on_step)
    seconds = time.perf_counter() - start
    figures = result.best if data.val is data.test else task.measure(task.model, data.test, runtime.device)
    report = DetectionReport(candidate.name, task.model, data.class_names, figures, result, seconds)
    if out is not None:
        numbers = {"figures": figures, "result": asdict(result), "seconds": seconds}
        numbers |= {"task": task.identity, "fit": asdict(fit_config)}
        write_state(out / DETECTOR_FOLDER, task.model.state_dict(), numbers)
        shutil.rmtree(out / STATE_FOLDER)
    return report


def check_detection(
    candidates: Sequence[Candidate], data: DetectionData, config: DetectConfig, fit_config: FitConfig
) -> None:
    """Makes every detector once, so that what cannot be trained is refused before the first is.

    Raises:
        DataError: see `DetectionTask`.
        ConfigError: see `DetectionTask`.
    """
    for candidate in candidates:
        DetectionTask(candidate, data, config, batch_size=fit_config.batch_size)


def _read(folder: Path, task: DetectionTask, candidate: Candidate, fit_config: FitConfig) -> DetectionReport | None:
    """The run that ended there, if there is one."""
    found = read_state(folder)
    if found is None:
        return None
    tensors, numbers = found
    if (numbers["task"], numbers["fit"]) != (task.identity, asdict(fit_config)):
        raise CheckpointError(
            f"{folder} is of another network, other images or other numbers. Give the same options to go on, or "
            "another --out."
        )
    task.model.load_state_dict(tensors)
    result: dict[str, Any] = numbers["result"]
    return DetectionReport(
        candidate.name,
        task.model.eval(),
        task.data.class_names,
        numbers["figures"],
        FitResult(result["best"], result["best_epoch"], tuple(result["history"])),
        numbers["seconds"],
        was_there=True,
    )


def _kind(dataset: CocoDataset) -> str:
    return _words(dataset.num_channels, dataset.has_masks)


def _words(num_channels: int, has_masks: bool) -> str:
    return f"images of {num_channels} channels {'with' if has_masks else 'without'} masks"
