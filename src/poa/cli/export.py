"""`poa export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import report_skipped
from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.errors import ConfigError

if TYPE_CHECKING:
    from poa.deploy.export.base import Exporter
    from poa.deploy.export.images import ExportImages
    from poa.deploy.export.run import Export
    from poa.evaluate.run import Splits
    from poa.family import Family

Format = Literal[
    "timm",
    "transformers",
    "onnx",
    "onnx-int8",
    "onnx-int8-dynamic",
    "openvino",
    "openvino-int8",
    "torch-export",
    "executorch",
]
SOME_FAILED = 1


@dataclass(frozen=True)
class ExportCommand:
    """Write sub-networks in several formats: into OUT/SUBNET/FORMAT, each whole or not at all.

    Each is opened by its own runtime and compared with the family; the difference, size and latency are in the table
    and in its README.md, a model card. Called again, what is complete is left as it is. One that fails does not keep
    the others from being written; the exit status is 1 then.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    subnets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names like w384-d12; all, smallest, middle, intact."""
    to: tuple[Format, ...]
    """The formats."""
    out: Path
    """The directory above all that is written."""
    image_size: int | None = None
    """Side of the images that the models are for; the family's own by default."""
    images: str | None = None
    """Images to compare on, and to calibrate formats of 8 bits on: a folder, a .parquet file, digits; else noise."""
    num_images: int = 128
    """So many to compare on, and as many others to calibrate on; of few images half each."""
    accuracy: bool = False
    """Measure what formats of 8 bits cost in top-1 accuracy, on all of --images, which need labels then."""
    normalise_inside: bool = False
    """The model takes values of 0–1 and normalises them itself; of formats that hold a graph."""
    num_threads: int = 1
    """Of the runtimes, for the latency."""
    license: str | None = None
    """Of the weights, for the model cards (apache-2.0 for example); where they started from others', theirs."""
    overwrite: bool = False
    """Write again what is there."""
    json: bool = False
    """Print JSON instead of a table."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(ExportCommand, prog="poa export", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    _check(command)
    from poa.deploy.export.registry import find_exporters
    from poa.deploy.export.run import ExportOptions, export_all
    from poa.family import load

    exporters = find_exporters(command.to, normalise_inside=command.normalise_inside)
    if command.images is None:
        _refuse_without_images(exporters)
    family = load(command.path)
    subnets = family.space.parse_all(command.subnets)
    images, data = _images(command, family, exporters)
    options = ExportOptions(command.image_size, command.num_threads, command.overwrite, command.license)
    with bars() as shown:

        def show(what: str, done: int, total: int) -> None:
            for earlier in list(shown.tasks):
                shown.hide(earlier)
            shown.show(what, done, total)

        found = export_all(
            family,
            subnets,
            exporters,
            command.out,
            options=options,
            images=images,
            data=data,
            on_progress=show,
        )
    return _reported(command, found)


def _check(command: ExportCommand) -> None:
    """Refuses what cannot be done, or would do nothing.

    Raises:
        ConfigError: there is such an option.
    """
    if not command.subnets:
        raise ConfigError("no sub-network is named. Give names like w384-d12, or all, smallest, middle, intact.")
    for name in ("num_images", "num_threads"):
        if getattr(command, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(command, name)}.")
    if command.images is None and command.accuracy:
        raise ConfigError("--accuracy is measured on labelled images: name them with --images.")
    if command.accuracy and not any("int8" in name for name in command.to):
        raise ConfigError("--accuracy is of formats of 8 bits, and --to names none; float32 ones are exact.")


def _refuse_without_images(exporters: Sequence[Exporter]) -> None:
    names = [exporter.name for exporter in exporters if exporter.needs_calibration]
    if names:
        raise ConfigError(
            f"{' and '.join(names)}: scales are chosen on images of the kind that the model will see. Name a folder "
            f"or a .parquet file of them with --images."
        )


def _images(
    command: ExportCommand, family: Family, exporters: Sequence[Exporter]
) -> tuple[ExportImages | None, Splits | None]:
    """What is compared and calibrated on, and the labelled images where accuracy is asked for."""
    if command.images is None:
        return None, None
    from poa.data import open_source
    from poa.deploy.export.images import read_images
    from poa.evaluate import split
    from poa.evaluate.knn import Knn

    channels = family.card.preprocessing.num_channels
    source = open_source(command.images, command.reading.config(), channels, require_labels=command.accuracy)
    images = read_images(
        family,
        source,
        command.num_images,
        image_size=command.image_size,
        needs_calibration=any(exporter.needs_calibration for exporter in exporters),
        max_bad_share=command.reading.max_bad_share,
    )
    report_skipped(images.skipped)
    return images, split(source, None, [Knn()]) if command.accuracy else None


def _reported(command: ExportCommand, found: Sequence[Export]) -> int:
    from poa.deploy.export.run import as_json

    failed = [each for each in found if each.error]
    if command.json:
        print(json.dumps([as_json(each) for each in found], indent=2))
    else:
        _print_table(command.out, found)
    for each in failed:
        print(f"{each.trace}error: {each.subnet} as {each.format} was not written: {each.error}", file=sys.stderr)
    return SOME_FAILED if failed else 0


def _print_table(out: Path, found: Sequence[Export]) -> None:
    table = Table(title=f"{sum(not each.error for each in found)} of {len(found)} exports in {out}")
    for name in ("sub-network", "format"):
        table.add_column(name, no_wrap=True)
    has_accuracy = any(each.comparison and each.comparison.accuracy for each in found)
    for name in ("MB", "ms", "difference", *(["points lost"] if has_accuracy else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        shown = each.comparison
        cells = ["", "", "failed"]
        if shown is not None:
            cells = [f"{shown.num_bytes / 1e6:.2f}", f"{shown.latency_ms:.3g}", f"{shown.max_abs_difference:.1e}"]
        if has_accuracy:
            drop = shown.accuracy if shown else None
            cells.append("" if drop is None else f"{100 * drop.drop:.2f} ± {100 * drop.standard_error:.2f}")
        table.add_row(each.subnet, each.format, *cells)
    console = Console()
    console.print(table)
    if num_known := sum(each.is_known for each in found):
        console.print(f"{num_known} were there already.", highlight=False)
    first = next((each.comparison for each in found if each.comparison), None)
    if first is not None:
        of_what = f"{first.num_images} images" + (" of noise (name real ones with --images)" if first.is_noise else "")
        console.print(
            f"Difference: the largest of a value from the family's, on {of_what}. MB: the weights. ms: one image, "
            f"{first.num_threads} thread{'s' if first.num_threads > 1 else ''}."
            + (" Points lost: of top-1 accuracy, in percent, with the standard error." if has_accuracy else ""),
            highlight=False,
            soft_wrap=True,
        )
