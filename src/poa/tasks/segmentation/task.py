"""Semantic segmentation on any network: a linear head or UPerNet, trained and measured."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from poa.config import FitConfig
from poa.config.segment import SegmentConfig, SegmentHead
from poa.data import make_loader, normalize
from poa.errors import CheckpointError, ConfigError, DataError
from poa.files import json_value, write_json
from poa.models import Candidate
from poa.randomness import derived_seed
from poa.runtime import Runtime
from poa.tasks.dense.multiscale import Scales, last_scales, multi_scale
from poa.tasks.fit import STATE_FOLDER, OnStep, Task, fit
from poa.tasks.segmentation.batches import MaskedBatch, MeasuredBatch, MeasuredMasks, TrainingCrops
from poa.tasks.segmentation.data import IGNORED, DenseImages, SegmentationData

RESULT_FILE = "result.json"
_LINEAR_STD = 0.01


class LinearHead(nn.Module):
    """Batch norm and a 1×1 convolution on maps resized to the first and put together (DINOv2; Oquab et al., 2023)."""

    def __init__(self, num_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(num_channels))
        self.classifier = nn.Conv2d(sum(num_channels), num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=_LINEAR_STD)
        if self.classifier.bias is not None:
            nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B K h w"]:
        """The logits at the places of the first map."""
        same = [maps[0], *(resized(part, (maps[0].shape[2], maps[0].shape[3])) for part in maps[1:])]
        logits: Tensor = self.classifier(self.norm(torch.cat(same, dim=1)))
        return logits


class UPerHead(nn.Module):
    """UPerNet's decoder (Xiao et al., 2018) of segmentation_models_pytorch on four maps, and a 1×1 convolution.

    Raises:
        DataError: the library is not installed.
    """

    def __init__(self, num_channels: Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError as error:
            raise DataError(
                'UPerNet needs segmentation_models_pytorch, which is not installed: pip install "poa[dense]"'
            ) from error
        # The decoder counts the image and its half as maps, and looks at neither.
        self.decoder: nn.Module = UPerNetDecoder([0, 0, *num_channels], len(num_channels) + 1, width)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B K h w"]:
        """The logits at the places of the first map."""
        logits: Tensor = self.classifier(self.decoder([maps[0], maps[0], *maps]))
        return logits


class Segmenter(nn.Module):
    """A network, the maps that are made of it, and a head.

    Attributes:
        backbone: a timm network.
        scales: which maps the head sees.
        head: gives logits at the places of the first.
    """

    def __init__(self, backbone: nn.Module, scales: Scales, head: LinearHead | UPerHead) -> None:
        super().__init__()
        self.backbone, self.scales, self.head = backbone, scales, head

    def forward(self, images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B K H W"]:
        """The logits of every pixel of normalised images."""
        logits: Tensor = self.head(self.scales(self.backbone, images))
        return resized(logits.float(), (images.shape[2], images.shape[3]))


def build_segmenter(
    candidate: Candidate, num_classes: int, head: SegmentHead, config: SegmentConfig, seed: int, *, freeze: bool
) -> Segmenter:
    """A copy of the candidate's network with a fresh head.

    Args:
        candidate: the network.
        num_classes: the logits.
        head: which head.
        config: size of the images, numbers of the head.
        seed: of the fresh weights.
        freeze: whether the network stays as it is; then it has no stochastic depth.

    Raises:
        ConfigError: the network cannot take images of that size, or gives no intermediate maps.
        DataError: UPerNet's library is not installed.
    """
    drop_path = 0.0 if freeze or head == "linear" else config.drop_path
    network = candidate.network(canvas_of(candidate, config), drop_path=drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "segment weights"))
        if head == "linear":
            scales = last_scales(network, config.num_maps)
            return Segmenter(network, scales, LinearHead(scales.num_channels, num_classes))
        scales = multi_scale(network).scales
        return Segmenter(network, scales, UPerHead(scales.num_channels, num_classes, config.channels))


def check_networks(
    candidates: Sequence[Candidate], head: SegmentHead, config: SegmentConfig, fit_config: FitConfig
) -> None:
    """Refuses networks that cannot be trained to segment, before work starts.

    Raises:
        ConfigError: one cannot take images of that size or gives no intermediate maps, or they take images of different
            numbers of channels.
        DataError: UPerNet's library is not installed.
    """
    channels = {candidate.preprocessing.num_channels for candidate in candidates}
    if len(channels) > 1:
        numbers = " and ".join(map(str, sorted(channels)))
        raise ConfigError(f"the networks take images of {numbers} channels. Evaluate them one by one.")
    for candidate in candidates:
        build_segmenter(candidate, 2, head, config, 0, freeze=fit_config.freeze)


class SegmentationTask(Task):
    """Giving every pixel its class; the best epoch is that of largest mIoU on `data.val`, or else on `data.test`.

    Args:
        candidate: the network, of which a copy is trained.
        data: the images.
        head: which head; a linear one is trained on the frozen network.
        config: what is done to the images, numbers of the head.
        fit_config: batch size and seed.
        num_workers: processes that decode.

    Raises:
        ConfigError: the network cannot take images of that size, or the batch is too small.
        DataError: UPerNet's library is not installed.
    """

    metric = "miou"

    def __init__(
        self,
        candidate: Candidate,
        data: SegmentationData,
        head: SegmentHead,
        config: SegmentConfig,
        fit_config: FitConfig,
        num_workers: int = 0,
    ) -> None:
        if head == "upernet" and min(fit_config.batch_size, len(data.train)) < 2:
            raise ConfigError(
                f"UPerNet's batch norms need two images in a batch; got --fit.batch-size {fit_config.batch_size} and "
                f"{len(data.train)} training images."
            )
        self.data, self.how, self.num_workers = data, candidate.preprocessing, num_workers
        self.batch_size = fit_config.batch_size
        self.canvas = canvas_of(candidate, config)
        self.model: Segmenter = build_segmenter(
            candidate, len(data.class_names), head, config, fit_config.seed, freeze=fit_config.freeze
        )
        self.training = TrainingCrops(data.train, config, self.canvas, self.how, fit_config.batch_size, fit_config.seed)
        self.identity = identity_of(candidate, data, head, config)

    def num_steps(self) -> int:
        """See `Task.num_steps`."""
        return len(self.training)

    def batches(self, epoch: int) -> Iterator[MaskedBatch]:
        """See `Task.batches`."""
        first = epoch * self.num_steps()
        pinned = torch.cuda.is_available()
        return iter(make_loader(self.training, first, first + self.num_steps(), self.num_workers, pinned))

    def loss(self, model: nn.Module, batch: MaskedBatch, device: torch.device) -> dict[str, Tensor]:
        """See `Task.loss`: the mean cross entropy of the pixels that are of a class."""
        images = normalize(batch.images.to(device, non_blocking=True), self.how.mean, self.how.std)
        masks = batch.masks.to(device, non_blocking=True).long()
        total = F.cross_entropy(model(images), masks, ignore_index=IGNORED, reduction="sum")
        return {"pixel": total / (masks != IGNORED).sum().clamp(min=1)}

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """See `Task.evaluate`: `figures_of` the validation images, or else the test images."""
        return self.measure(model, device, self.data.val or self.data.test)

    def measure(self, model: nn.Module, device: torch.device, images: DenseImages) -> dict[str, float]:
        """The figures of `figures_of` on images at their own sizes."""
        num_classes = len(self.data.class_names)
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        batches = MeasuredMasks(images, self.canvas, self.how, self.batch_size)
        for batch in make_loader(batches, 0, len(batches), self.num_workers, torch.cuda.is_available()):
            for truth, found in zip(batch.masks, self.predict(model, batch, device), strict=True):
                confusion += confusion_matrix(truth.to(device), found, num_classes)
        return figures_of(confusion, self.data.class_names)

    def predict(self, model: nn.Module, batch: MeasuredBatch, device: torch.device) -> Iterator[Int64[Tensor, "_ _"]]:
        """The class of every pixel of each image, at its own size."""
        logits = model(normalize(batch.images.to(device, non_blocking=True), self.how.mean, self.how.std))
        for each, view, truth in zip(logits, batch.views, batch.masks, strict=True):
            (row, column), (height, width) = view.offset, view.size
            shown = each[None, :, row : row + height, column : column + width]
            yield resized(shown, (truth.shape[0], truth.shape[1]))[0].max(dim=0).indices


def confusion_matrix(truth: UInt8[Tensor, "*s"], found: Int64[Tensor, "*s"], num_classes: int) -> Int64[Tensor, "K K"]:
    """Pixels by class (rows) and class found (columns); `IGNORED` ones are not counted."""
    used = truth != IGNORED
    pairs = truth[used].long() * num_classes + found[used]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def figures_of(confusion: Int64[Tensor, "K K"], class_names: Sequence[str]) -> dict[str, float]:
    """Mean intersection over union, the share of pixels found, and the intersection over union of each class.

    A class that no pixel is of and none was taken for is left out, of the mean too.
    Without a pixel nothing is a number.
    """
    counts = confusion.double()
    both = counts.diagonal()
    union = counts.sum(dim=0) + counts.sum(dim=1) - both
    seen = union > 0
    ious = both[seen] / union[seen]
    names = [name for name, is_seen in zip(class_names, seen.tolist(), strict=True) if is_seen]
    return {
        "miou": float(ious.mean()),
        "pixel_accuracy": float(both.sum() / counts.sum()),
        **{f"iou/{name}": value for name, value in zip(names, ious.tolist(), strict=True)},
    }


@dataclass(frozen=True)
class SegmentReport:
    """A network that was trained to segment.

    Attributes:
        figures: on the test images, see `figures_of`.
        best_epoch: whose weights gave them, counted from 1.
        history: see `FitResult`.
        predictions: of the test images that were asked for, the class of every pixel.
        is_known: whether it was there already.
    """

    figures: dict[str, float]
    best_epoch: int
    history: tuple[dict[str, float], ...]
    predictions: tuple[UInt8[np.ndarray, "_ _"], ...]
    is_known: bool = False


def train_segmentation(
    task: SegmentationTask,
    fit_config: FitConfig,
    runtime: Runtime,
    *,
    out: Path | None = None,
    shown: Sequence[int] = (),
    on_step: OnStep | None = None,
) -> SegmentReport:
    """Trains the task's model and measures it on the test images.

    Args:
        task: what is learnt.
        fit_config: the numbers; of a linear head the network is frozen whatever they say.
        runtime: where it computes.
        out: a directory for the result and, while it trains, the state; a run that is there goes on, a result that is
            there is given back.
        shown: test images whose predictions are wanted.
        on_step: told how far it is.

    Raises:
        NotFiniteError: the loss is no longer a finite number.
        CheckpointError: `out` holds the state of another run.
    """
    if isinstance(task.model.head, LinearHead):
        fit_config = replace(fit_config, freeze=True)
    found = fit(task, fit_config, runtime, out=out, on_step=on_step)
    with torch.inference_mode():
        model = task.model.to(runtime.device)
        figures = found.best if task.data.val is None else task.measure(model, runtime.device, task.data.test)
        predictions = tuple(_prediction(task, model, runtime.device, index) for index in shown)
    report = SegmentReport(figures, found.best_epoch, found.history, predictions)
    if out is not None:
        _write(report, out, shown)
    return report


def known_report(out: Path, shown: Sequence[int]) -> SegmentReport | None:
    """What `train_segmentation` wrote there; None if it has not, or showed other images.

    Raises:
        CheckpointError: it is damaged.
    """
    files = [out / f"prediction-{index}.png" for index in shown]
    if not all(path.is_file() for path in (out / RESULT_FILE, *files)):
        return None
    try:
        found = json_value((out / RESULT_FILE).read_bytes())
        predictions = tuple(np.array(Image.open(file, formats=("PNG",))) for file in files)
        return SegmentReport(found["figures"], found["best_epoch"], tuple(found["history"]), predictions, is_known=True)
    except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"the result in {out} is damaged: {error!r}. Remove it to compute it again.") from error


def result_folder(
    out: Path, candidate: Candidate, data: SegmentationData, head: SegmentHead, config: SegmentConfig, fit: FitConfig
) -> Path:
    """Where a network's result lies under `out`; another one for other weights, data or numbers."""
    identity = f"{identity_of(candidate, data, head, config)} {fit}"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", candidate.name)
    return out / "networks" / f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def identity_of(candidate: Candidate, data: SegmentationData, head: SegmentHead, config: SegmentConfig) -> str:
    """What tells one training from another, its `FitConfig` aside."""
    return f"segment {head} {candidate.fingerprint} {candidate.preprocessing} {data.fingerprint} {config}"


def canvas_of(candidate: Candidate, config: SegmentConfig) -> tuple[int, int]:
    """Height and width of what the network sees: as configured, or twice its own side."""
    side = 2 * candidate.preprocessing.image_size
    return config.image_size or (side, side)


def resized(maps: Float[Tensor, "B C _ _"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """The maps at that height and width, bilinear."""
    if (maps.shape[2], maps.shape[3]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _prediction(task: SegmentationTask, model: nn.Module, device: torch.device, index: int) -> UInt8[np.ndarray, "_ _"]:
    batch = MeasuredMasks(task.data.test, task.canvas, task.how, 1)[index]
    return next(task.predict(model, batch, device)).to(torch.uint8).cpu().numpy()


def _write(report: SegmentReport, out: Path, shown: Sequence[int]) -> None:
    """The predictions, then the result; then the state is not needed any more."""
    out.mkdir(parents=True, exist_ok=True)
    for index, prediction in zip(shown, report.predictions, strict=True):
        Image.fromarray(prediction).save(out / f"prediction-{index}.png")
    described = {"figures": report.figures, "best_epoch": report.best_epoch, "history": list(report.history)}
    write_json(out / RESULT_FILE, described)
    shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
