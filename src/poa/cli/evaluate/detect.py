"""`poa evaluate detect`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import NetworkChoice, check_outputs, print_results, report_skipped, title_of
from poa.cli.progress import bars
from poa.config import DETECT_FIT, DetectConfig, FitConfig, to_dict
from poa.config.checks import require, require_probability

if TYPE_CHECKING:
    from poa.evaluate import Result
    from poa.models import Candidate
    from poa.tasks.detection import CocoDataset, DetectionData, DetectionReport, Target

_MAX_LISTED = 5
_MAX_SHOWN = 6
"""Networks in the picture of detections."""


@dataclass(frozen=True)
class AnnotatedImages:
    """Images with boxes, in COCO's format.

    The images of X.json are looked for in the folder X, and where there is none in the folder that X.json is in.
    """

    train: Path
    """Annotations of the images to train on: a JSON file in COCO's format."""
    test: Path
    """Those of the images that the figures are of."""
    val: Path | None = None
    """Those of images that the best epoch is chosen on, where several are evaluated (--fit.evaluate-every); without
    them the test images choose it, which flatters all networks."""
    train_images: Path | None = None
    """The folder that the file names in --train are relative to, where it is another."""
    test_images: Path | None = None
    """That of --test."""
    val_images: Path | None = None
    """That of --val."""

    def open(self, config: DetectConfig, num_channels: int) -> DetectionData:
        """The images, with every annotation checked.

        Raises:
            ConfigError: a folder is given without its annotations.
            DataError: they cannot be used.
        """
        from poa.tasks.detection import CocoDataset, DetectionData

        images = self.val_images
        require(self.val is not None or images is None, "--val-images", images, "left out where there is no --val")

        def opened(file: Path, folder: Path | None) -> CocoDataset:
            return CocoDataset(file, folder or image_folder(file), config, num_channels)

        val = None if self.val is None else opened(self.val, self.val_images)
        return DetectionData(opened(self.train, self.train_images), opened(self.test, self.test_images), val)


@dataclass(frozen=True)
class EvaluateDetect:
    """Train a detector on a copy of every network, and measure it: COCO's average precision of boxes and masks.

    In --out: results.csv, results.json, the figures against the parameters (results.png), test images with what was
    found (detections.png), and a folder with the detector of every network. Stopped, the same command goes on.
    """

    network: OmitArgPrefixes[NetworkChoice]
    image: OmitArgPrefixes[AnnotatedImages]
    out: Path
    """The directory to write."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    fit: FitConfig = DETECT_FIT
    num_shown: int = 3
    """Test images in detections.png."""
    shown_score: float = 0.5
    """Detections of a lower score are not drawn."""

    def __post_init__(self) -> None:
        require(self.num_shown >= 1, "--num-shown", self.num_shown, "1 or more")
        require_probability("--shown-score", self.shown_score)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(
        EvaluateDetect, prog="poa evaluate detect", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )
    from poa.tasks.detection import check_detection, require_metric_libraries, train_detection

    require_metric_libraries()
    check_outputs(command.out / "results.json")
    networks, runtime = command.network.open()
    data = command.image.open(command.detect, networks[0].preprocessing.num_channels)
    check_detection(networks, data, command.detect, command.fit)
    for dataset in dict.fromkeys((data.train, data.val, data.test)):
        _describe(dataset)
    output = _Output(command, networks, data)
    with bars() as shown:
        for place, network in enumerate(networks):
            shown.show("networks", place, len(networks))
            folder, on_step = command.out / folder_of(network), partial(shown.show, network.name)
            output.add(network, train_detection(network, data, command.detect, command.fit, runtime, folder, on_step))
            shown.hide(network.name)
    output.draw()
    output.print()
    return 0


def image_folder(annotations: Path) -> Path:
    """Where the images of an annotation file are: in the folder of its name, else beside it."""
    named = annotations.with_suffix("")
    return named if named.is_dir() else annotations.parent


def folder_of(network: Candidate) -> str:
    """The name of the network's folder."""
    return re.sub(r"[^\w.-]+", "-", network.name).strip("-")


class _Output:
    """What the command writes: tables after every network, pictures in the end."""

    def __init__(self, command: EvaluateDetect, networks: Sequence[Candidate], data: DetectionData) -> None:
        from poa.tasks.detection import shown_images

        self.command, self.data, self.num_networks = command, data, len(networks)
        self.indices = shown_images(data.test, command.num_shown)
        step = max(1, -(-len(networks) // _MAX_SHOWN))
        self.shown = {network.name for network in networks[::step]}
        self.found: dict[str, list[Target]] = {}
        self.results: list[Result] = []
        self.training: dict[str, Any] = {}

    def add(self, network: Candidate, report: DetectionReport) -> None:
        """Takes in a network that is trained."""
        from poa.evaluate import Result
        from poa.tasks.curves import draw_history
        from poa.tasks.detection import detections_on

        folder = self.command.out / folder_of(network)
        sizes = (network.num_params, network.flops)
        self.results.append(Result("detect", network.name, network.source, *sizes, report.figures, "AP"))
        self.training[network.name] = {
            "folder": folder.name,
            "was_there": report.was_there,
            "seconds": report.seconds,
            **asdict(report.result),
        }
        draw_history(report.result.history, "AP", report.result.best_epoch, folder / "curves.png")
        if network.name in self.shown:
            self.found[network.name] = detections_on(report.model, self.data.test, self.indices)
        self._write_tables()

    def _write_tables(self) -> None:
        from poa.evaluate import Report
        from poa.evaluate.report import write_csv, write_results

        command, data = self.command, self.data
        parts = {"train": data.train, "val": data.val, "test": data.test}
        described = {
            "protocol": "detect",
            "options": {"detect": to_dict(command.detect), "fit": to_dict(command.fit)},
            "data": {name: _numbers(part) for name, part in parts.items()},
            "training": self.training,
        }
        skipped = tuple(bad for part in dict.fromkeys(parts.values()) for bad in part.counts.skipped)
        report = Report(tuple(self.results), len(data.train), len(data.test), skipped)
        write_csv(command.out / "results.csv", self.results)
        write_results(command.out / "results.json", report, described)

    def draw(self) -> None:
        """Writes the pictures."""
        from poa.evaluate.plots import save_front
        from poa.figures import save_figure
        from poa.tasks.detection import detection_picture

        save_front(self.command.out / "results.png", self.results, "AP of boxes, %")
        score = self.command.shown_score
        picture = detection_picture(self.data.test, self.indices, self.found, min_score=score)
        save_figure(picture, self.command.out / "detections.png")

    def print(self) -> None:
        """The table."""
        known = sum(part["was_there"] for part in self.training.values())
        if known:
            print(f"{known} of {self.num_networks} networks were there already.")
        print_results(self.results, title_of("detect", len(self.data.train), len(self.data.test)))
        Console().print(f"Tables, pictures, detectors: {self.command.out}", highlight=False, soft_wrap=True)


def _numbers(dataset: CocoDataset) -> dict[str, Any]:
    """For the record; what is left out is listed elsewhere."""
    counts = {name: value for name, value in asdict(dataset.counts).items() if isinstance(value, int)}
    return {"annotations": dataset.name, "class_names": list(dataset.class_names), **counts}


def _describe(dataset: CocoDataset) -> None:
    """Says what the annotations hold and what of them cannot be used."""
    counts = dataset.counts
    print(
        f"{dataset.name}: {counts.num_images:,} images with {counts.num_boxes:,} objects of "
        f"{len(dataset.class_names)} classes, {counts.num_negatives:,} of them without any; {counts.num_crowds:,} "
        f"crowds; {counts.num_clipped:,} boxes cut at the border of their image."
    )
    if counts.skipped:
        print(
            f"  left out: {len(counts.skipped_images):,} images with {counts.num_lost:,} annotations, "
            f"{len(counts.skipped_annotations):,} more annotations (results.json lists all)"
        )
        report_skipped(counts.skipped[:_MAX_LISTED])
