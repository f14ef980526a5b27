"""`poa report`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.reading import ReadingOptions
from poa.deploy.report.pictures import Pictures, PicturesConfig, pictures_of
from poa.errors import CheckpointError, ConfigError
from poa.files import json_value


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a family: sizes, quality and cost, a budget slider, training, provenance.

    The page needs no other file and no network.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory, or a family directory (without training curves)."""
    out: Path
    """The HTML file to write."""
    results: tuple[Path, ...] = ()
    """Tables of results of the sub-networks: results.csv of `poa evaluate sweep`, or what --csv wrote."""
    profile: tuple[Path, ...] = ()
    """Tables that `poa profile` wrote."""
    images: str | None = None
    """A folder of images, a .parquet file, or digits:test: shows what the smallest, middle and intact network see."""
    shown: OmitArgPrefixes[PicturesConfig] = field(default_factory=PicturesConfig)
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Report, prog="poa report", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    _check_images(command)
    from poa.deploy.report import Subject, points_of, write_page
    from poa.family import read_card
    from poa.files import check_writable
    from poa.train.run_directory import CONFIG_FILE, ENVIRONMENT_FILE

    card = read_card(command.path)
    check_writable(command.out)
    points = points_of(card, command.results, command.profile)
    environment = _text(command.path / ENVIRONMENT_FILE)
    subject = Subject(
        path=command.path,
        card=card,
        points=points,
        metrics=_metrics(command.path),
        environment=None if environment is None else _json(environment, command.path / ENVIRONMENT_FILE),
        config=_text(command.path / CONFIG_FILE),
        results=command.results,
        profiles=command.profile,
        pictures=_pictures(command),
        command=shlex.join(["poa", "report", *arguments]),
    )
    write_page(command.out, subject)
    print(f"The page: {command.out} ({command.out.stat().st_size / 1e3:,.0f} kB)")
    return 0


def _check_images(command: Report) -> None:
    """Refuses options of images where there are none.

    Raises:
        ConfigError: so it is.
    """
    if command.images is None and (command.shown, command.reading) != (PicturesConfig(), ReadingOptions()):
        raise ConfigError("options of pictures (--num-images, --image-column, …) need --images, which is not given.")


def _metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The run's metrics; none of a family alone."""
    from poa.train.metrics import METRICS_FILE

    file = path / METRICS_FILE
    lines = [_json(line, file) for line in (_text(file) or "").splitlines()]
    if not all("step" in line for line in lines):
        raise CheckpointError(f"{file} is damaged: a line has no step. Copy the run anew.")
    return tuple(lines)


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}.") from error


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        found = json_value(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}). Go on with the run, or copy it anew.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: {text[:40]!r} is no JSON object. Copy the run anew.")
    return found


def _pictures(command: Report) -> Pictures | None:
    if command.images is None:
        return None
    from poa.cli.progress import bars
    from poa.data import open_source
    from poa.models import open_models

    candidates = open_models([str(command.path)], ["smallest", "middle", "intact"])
    source = open_source(command.images, command.reading.config(), candidates[0].preprocessing.num_channels)
    with bars() as shown:
        shown.show("pictures", 0, 1)
        return pictures_of(candidates, source, command.shown, command.reading.max_bad_share)
