"""Several sub-networks in several formats: written, opened by their runtimes, compared with the family, described."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from poa.config import from_dict
from poa.deploy.export.accuracy import check_labelled
from poa.deploy.export.base import Exported, Exporter
from poa.deploy.export.card import licence_of, write_card
from poa.deploy.export.compare import TOLERANCE, Comparison, Timing, compare
from poa.deploy.export.images import ExportImages
from poa.elastic import Subnet
from poa.errors import CheckpointError, ConfigError, PoaError
from poa.evaluate.run import Splits
from poa.family import Family, Verification
from poa.files import json_value, replace_directory, write_json

RECORD_FILE = "poa.json"
"""Written last: a directory that holds it is complete."""


@dataclass(frozen=True)
class ExportOptions:
    """What holds for all that is exported."""

    image_size: int | None = None
    """Side of the images; the family's own by default."""
    num_threads: int = 1
    """Of the runtimes, while latency is measured."""
    overwrite: bool = False
    """Write again what is there."""
    licence: str | None = None
    """Of the weights, for the model cards, where they did not start from others'."""


@dataclass(frozen=True)
class Export:
    """What became of one sub-network in one format.

    Attributes:
        subnet: its name.
        format: the format's name.
        directory: where it lies.
        comparison: with the family; None where it failed.
        is_known: it was complete already and was left as it is.
        error: why it failed; empty where it did not.
        trace: the traceback, where the failure is not a mistake that the user can mend.
    """

    subnet: str
    format: str
    directory: Path
    comparison: Comparison | None = None
    is_known: bool = False
    error: str = ""
    trace: str = ""


def export_all(
    family: Family,
    subnets: Sequence[Subnet],
    exporters: Sequence[Exporter],
    out: Path,
    *,
    options: ExportOptions = ExportOptions(),
    images: ExportImages | None = None,
    data: Splits | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Export]:
    """Writes every sub-network in every format into OUT/SUBNET/FORMAT, each whole or not at all.

    Complete ones of the same weights, image size and options are left as they are. One that fails is reported and does
    not keep the others from being written. One sub-network is in memory at a time.

    Args:
        family: what is cut from.
        subnets: in the order in which they are written.
        exporters: the formats.
        out: the directory above all.
        options: what holds for all.
        images: what is compared and calibrated on; noise, and no calibration, if None.
        data: labelled images on which the accuracy of the formats of 8 bits is measured.
        on_progress: called with what is under way, how many are done and how many there are.

    Returns:
        One entry for each pair, those of a sub-network together.

    Raises:
        ConfigError: a library is missing, a format needs images to calibrate on, the weights have another licence, or
            no network can be cut for that image size; before anything is written.
        DataError: the labelled images do not do; before anything is written.
        CheckpointError: a directory holds something else, and `overwrite` is False; before anything is written.
    """
    size = family.checked_image_size(options.image_size)
    licence_of(family, options.licence)
    _check(exporters, images)
    calibration = None if images is None else images.calibration
    pairs = [(Exported(family, subnet, size, calibration), exporter) for subnet in subnets for exporter in exporters]
    if data is not None:
        check_labelled(pairs[0][0], data)
    made = _Made(images, data, options)
    known = [made.known(exporter, what, _place(out, what, exporter)) for what, exporter in pairs]
    found: list[Export] = []
    for number, ((what, exporter), before) in enumerate(zip(pairs, known, strict=True)):
        if on_progress is not None:
            on_progress(f"{what.subnet} {exporter.name}", number, len(pairs))
        place = _place(out, what, exporter)
        if before is None:
            found.append(_attempted(exporter, what, place, made))
            gc.collect()
        else:
            found.append(Export(str(what.subnet), exporter.name, place, before, is_known=True))
    return found


def _check(exporters: Sequence[Exporter], images: ExportImages | None) -> None:
    for exporter in exporters:
        exporter.require()
        if exporter.needs_calibration and (images is None or images.calibration is None):
            raise ConfigError(
                f"the format {exporter.name} chooses its scales on images: give some hundred of the kind that the "
                f"model will see (--images)."
            )


def _place(out: Path, what: Exported, exporter: Exporter) -> Path:
    return out / str(what.subnet) / exporter.name


@dataclass(frozen=True)
class _Made:
    """What all pairs of a call are made with."""

    images: ExportImages | None
    data: Splits | None
    options: ExportOptions

    def write(self, exporter: Exporter, what: Exported, place: Path) -> Comparison:
        """Writes one pair, opens it, compares it and describes it."""
        with replace_directory(place, overwrite=self.options.overwrite) as scratch:
            exporter.write(what, scratch)
            found = compare(
                exporter,
                what,
                scratch,
                None if self.images is None else self.images.compared,
                data=self._labelled(exporter),
                timing=Timing(self.options.num_threads),
            )
            write_card(scratch, exporter, what, found, self.images, licence=self.options.licence)
            checked = Verification(
                str(what.subnet), found.relative_difference, found.max_abs_difference, TOLERANCE, found.num_images
            )
            record = what.family.record(what.subnet, what.image_size, checked)
            described = {"made_of": self.made_of(exporter, what), "comparison": asdict(found)}
            write_json(scratch / RECORD_FILE, record | described)
        return found

    def known(self, exporter: Exporter, what: Exported, place: Path) -> Comparison | None:
        """What was found of the pair when it was written, if that is complete and the same.

        Raises:
            CheckpointError: something else lies there, and it may not be overwritten.
        """
        if self.options.overwrite or not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return None
        try:
            record = json_value((place / RECORD_FILE).read_bytes())
            was, wanted = record["made_of"], self.made_of(exporter, what)
            differing = [name for name in wanted if was[name] != wanted[name]]
            if not differing:
                return from_dict(Comparison, record["comparison"], str(place / RECORD_FILE))
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{place} holds something that is no complete export. Name another --out, or allow it to be "
                f"overwritten (--overwrite)."
            ) from error
        name = differing[0]
        raise CheckpointError(
            f"{place} is there already with another {name.replace('_', ' ')} ({was[name]!r}, now {wanted[name]!r}). "
            f"Name another --out, or allow it to be overwritten (--overwrite)."
        )

    def made_of(self, exporter: Exporter, what: Exported) -> dict[str, Any]:
        """What tells exports apart: another value of any of these is another export."""
        labelled = self._labelled(exporter)
        return {
            "family_weights_sha256": what.family.card.weights_sha256,
            "subnet": str(what.subnet),
            "format": exporter.name,
            "format_options": asdict(exporter),
            "image_size": what.image_size,
            "images": None if self.images is None else self.images.fingerprint,
            "labelled_images": None if labelled is None else labelled.train.fingerprint,
            "num_threads": self.options.num_threads,
            "licence": self.options.licence,
        }

    def _labelled(self, exporter: Exporter) -> Splits | None:
        """The labelled images, for formats that cost accuracy."""
        return None if exporter.precision == "float32" else self.data


def _attempted(exporter: Exporter, what: Exported, place: Path, made: _Made) -> Export:
    """The pair, written; or why it could not be."""
    subnet, name = str(what.subnet), exporter.name
    try:
        return Export(subnet, name, place, made.write(exporter, what, place))
    except PoaError as error:
        return Export(subnet, name, place, error=str(error))
    except Exception as error:  # noqa: BLE001 (of foreign libraries; reported with its traceback)
        return Export(subnet, name, place, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def as_json(found: Export) -> dict[str, Any]:
    """The entry for JSON."""
    shown = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "trace"}
    comparison = None if found.comparison is None else asdict(found.comparison)
    return shown | {"directory": str(found.directory), "comparison": comparison}
