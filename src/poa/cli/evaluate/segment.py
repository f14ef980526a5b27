"""`poa evaluate segment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import NetworkChoice, check_outputs, print_results, report_skipped, title_of
from poa.cli.progress import Bars, bars
from poa.config import FitConfig, to_dict
from poa.config.segment import SEGMENT_FIT, SegmentConfig, SegmentHead
from poa.errors import ConfigError

if TYPE_CHECKING:
    from poa.evaluate import Result
    from poa.models import Candidate
    from poa.runtime import Runtime
    from poa.tasks.segmentation.data import SegmentationData
    from poa.tasks.segmentation.task import SegmentReport

_MAX_COLUMNS = 4
"""Networks in the picture."""


@dataclass(frozen=True)
class SegmentImages:
    """Which images."""

    train: str
    """Images to train on: a folder with images/ and masks/ (PNG of the same names with class ids), or a COCO .json."""
    test: str
    """Images to measure on, likewise."""
    val: str | None = None
    """Images to choose the best epoch by, where several are evaluated (--fit.evaluate-every), likewise; without them
    the test images choose it, which flatters all networks."""
    classes: Path | None = None
    """A JSON file {"names": [...], "ignore_index": 255}; by default classes.json in the folder of --train or above."""


@dataclass(frozen=True)
class EvaluateSegment:
    """Train a head for semantic segmentation on every network, and measure it: mean intersection over union.

    In --out: results.csv, results.json, test images with what the networks find (predictions.png), and the figure
    against the parameters (miou.png). Stopped, the same command goes on.
    """

    network: OmitArgPrefixes[NetworkChoice]
    image: OmitArgPrefixes[SegmentImages]
    out: Path
    """The directory for the table, the pictures and, while it runs, the state."""
    head: SegmentHead = "linear"
    """linear: batch norm and a 1x1 convolution, the network is frozen; upernet: all is trained, or with --fit.freeze
    the decoder."""
    num_shown: int = 4
    """Test images in the picture."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    fit: FitConfig = SEGMENT_FIT


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(
        EvaluateSegment, prog="poa evaluate segment", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )
    if command.num_shown < 1:
        raise ConfigError(f"--num-shown must be 1 or more; got {command.num_shown}.")
    if command.out.is_file():
        raise ConfigError(f"--out {command.out} is a file. Name a directory.")
    check_outputs(command.out / "results.json")
    from poa.tasks.segmentation.task import check_networks

    networks, runtime = command.network.open()
    check_networks(networks, command.head, command.segment, command.fit)
    with bars() as shown:
        data = _opened(command, networks, shown)
        report_skipped(data.skipped)
        reports = _trained(command, networks, data, runtime, shown)
    known = sum(report.is_known for report in reports)
    if known:
        print(f"{known} results were there already.")
    results = _results(command, networks, reports)
    print_results(results, title_of(f"segmentation, {command.head} head", len(data.train), len(data.test)))
    _draw(command, data, results, reports)
    Console().print(f"The table and the pictures: {command.out}", highlight=False, soft_wrap=True)
    return 0


def _opened(command: EvaluateSegment, networks: Sequence[Candidate], shown: Bars) -> SegmentationData:
    from poa.tasks.segmentation.data import open_segmentation

    image = command.image
    return open_segmentation(
        image.train,
        image.test,
        command.segment,
        networks[0].preprocessing.num_channels,
        val=image.val,
        classes=image.classes,
        on_progress=lambda name, done, total: shown.show(f"checking {name}", done, total),
    )


def _trained(
    command: EvaluateSegment, networks: Sequence[Candidate], data: SegmentationData, runtime: Runtime, bars: Bars
) -> list[SegmentReport]:
    """Every network in turn; those that were done already are not done again. The table is written after each."""
    from poa.tasks.curves import draw_history
    from poa.tasks.segmentation.pictures import shown_images
    from poa.tasks.segmentation.task import SegmentationTask, known_report, result_folder, train_segmentation

    numbers = (command.head, command.segment, command.fit)
    shown = shown_images(len(data.test), command.num_shown)
    reports: list[SegmentReport] = []
    for place, network in enumerate(networks):
        bars.show("networks", place, len(networks))
        folder = result_folder(command.out, network, data, *numbers)
        report = known_report(folder, shown)
        if report is None:
            task = SegmentationTask(network, data, *numbers, num_workers=runtime.num_workers)
            on_step = partial(bars.show, network.name)
            report = train_segmentation(task, command.fit, runtime, out=folder, shown=shown, on_step=on_step)
            bars.hide(network.name)
            if len(report.history) > 1:
                draw_history(report.history, task.metric, report.best_epoch, folder / "curves.png")
        reports.append(report)
        _write(command, data, _results(command, networks, reports))
    return reports


def _results(command: EvaluateSegment, networks: Sequence[Candidate], reports: Sequence[SegmentReport]) -> list[Result]:
    from poa.evaluate import Result

    return [
        Result(
            protocol=f"segment-{command.head}",
            network=network.name,
            source=network.source,
            num_params=network.num_params,
            flops=network.flops,
            figures=report.figures,
            headline="miou",
        )
        for network, report in zip(networks[: len(reports)], reports, strict=True)
    ]


def _write(command: EvaluateSegment, data: SegmentationData, results: Sequence[Result]) -> None:
    from poa.evaluate import Report
    from poa.evaluate.report import write_csv, write_results

    report = Report(tuple(results), len(data.train), len(data.test), data.skipped)
    described = {"protocol": f"segment-{command.head}", "data": to_dict(command.image)}
    options = {"segment": to_dict(command.segment), "fit": to_dict(command.fit)}
    write_results(command.out / "results.json", report, {**described, **options, "classes": data.class_names})
    write_csv(command.out / "results.csv", results)


def _draw(
    command: EvaluateSegment, data: SegmentationData, results: Sequence[Result], reports: Sequence[SegmentReport]
) -> None:
    from poa.evaluate.plots import save_front
    from poa.figures import save_figure
    from poa.tasks.segmentation.pictures import segmentation_picture, shown_images

    shown = shown_images(len(data.test), command.num_shown)
    predictions = {
        f"{results[place].network}\nmIoU {results[place].value:.1%}": reports[place].predictions
        for place in shown_images(len(results), _MAX_COLUMNS)
    }
    picture = segmentation_picture(data.test, shown, predictions)
    save_figure(picture, command.out / "predictions.png")
    save_front(command.out / "miou.png", results, f"segmentation ({command.head} head): mIoU, %")
