"""The table of what sub-networks cost on devices: a CSV file with one row for each sub-network and setting."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from poa.deploy.profile.kit.rows import COLUMNS, KEY, Row, merged, text_of, write_rows
from poa.elastic.subnet import Subnet
from poa.errors import DataError, SubnetError
from poa.family import FamilyCard


class Setting(NamedTuple):
    """Where and how the networks ran: the rows of one setting can be compared."""

    device: str
    """The name of the processor, or the one that the user gave."""
    runtime: str
    """`torch`, or the name of an export format: `onnx`, `openvino`, …"""
    precision: str
    """`float32` or `int8`."""
    num_threads: int
    batch_size: int
    image_size: int
    """Side of the images, in pixels."""
    family: str
    """The first 12 hexadecimal digits of the SHA-256 of the family's weights."""


@dataclass(frozen=True)
class ProfileRow:
    """What one sub-network costs in one setting. MB are 10⁶ bytes."""

    device: str
    runtime: str
    precision: str
    num_threads: int
    batch_size: int
    image_size: int
    subnet: str
    is_measured: bool
    """False: predicted by a model fitted to the measured rows of the setting."""
    latency_ms: float
    """Of one batch, the median."""
    latency_p95_ms: float
    """Of one batch, the 95th percentile."""
    throughput: float
    """Images per second at the median latency."""
    peak_memory_mb: float | None
    """Above the idle runtime: weights, activations, buffers; None where the system does not tell."""
    num_params: int
    flops: int
    """Of one image."""
    file_size_mb: float
    """Of the exported weights."""
    fit_error: float | None
    """Of predicted rows: root mean square of the fit's relative errors of latency at measured rows left out of it."""
    family: str
    date: str
    """When it was measured or predicted: YYYY-MM-DD."""
    poa_version: str

    @property
    def setting(self) -> Setting:
        """Where and how it ran."""
        return Setting(*(getattr(self, name) for name in Setting._fields))

    @property
    def key(self) -> tuple[Setting, str]:
        """What tells it apart from other rows."""
        return self.setting, self.subnet


def family_key(card: FamilyCard) -> str:
    """How the table names a family: the first 12 hexadecimal digits of the SHA-256 of its weights."""
    return card.weights_sha256[:12]


def read_profile(path: str | Path) -> tuple[ProfileRow, ...]:
    """The rows of a table that `poa profile` or a kit wrote.

    Raises:
        DataError: there is no such file, a column is missing or unknown, a value is not what its column holds (the
            line and the column are named), or two rows have the same key.
    """
    file = Path(path)
    try:
        lines = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))
    except OSError as error:
        raise DataError(f"cannot read the profile {file}: {error.strerror}. `poa profile` writes one.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no profile: it is not CSV in UTF-8 ({error}).") from error
    _check_columns(file, lines[0] if lines else [])
    found: dict[tuple[Setting, str], int] = {}
    rows = []
    for number, values in enumerate(lines[1:], start=2):
        if not values:
            continue
        row = _parsed(file, number, lines[0], values)
        if row.key in found:
            raise DataError(
                f"{file}, line {number}: {row.subnet} stands there twice for {row.device}, {row.runtime} (first in "
                f"line {found[row.key]}). Delete one of them."
            )
        found[row.key] = number
        rows.append(row)
    return tuple(rows)


def write_profile(path: str | Path, rows: Iterable[ProfileRow]) -> tuple[ProfileRow, ...]:
    """Writes rows into a table, all or nothing; those that are there stay. Gives back all rows of the table.

    A row replaces the one of its key, but no predicted row replaces a measured one.

    Raises:
        DataError: the file is there and is no table, or cannot be written.
    """
    file = Path(path)
    old = read_profile(file) if file.exists() else ()
    try:
        write_rows(file, merged(map(_as_text, old), map(_as_text, rows)))
    except OSError as error:
        raise DataError(f"cannot write {file}: {error.strerror}.") from error
    return read_profile(file)


def _as_text(row: ProfileRow) -> Row:
    return {name: text_of(getattr(row, name)) for name in COLUMNS}


def _check_columns(file: Path, header: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    if missing or unknown or len(header) != len(set(header)):
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown) or 'a column twice'}"
        raise DataError(f"{file} is no profile: its first line {what}. Columns of a profile: {', '.join(COLUMNS)}.")


def _parsed(file: Path, number: int, header: list[str], values: list[str]) -> ProfileRow:
    where = f"{file}, line {number}"
    if len(values) != len(header):
        raise DataError(f"{where}: {len(values)} values for {len(header)} columns.")
    found: dict[str, Any] = {}
    for name, text in zip(header, values, strict=True):
        try:
            found[name] = _READERS[name](text)
        except (ValueError, SubnetError) as error:
            raise DataError(f"{where}, column {name}: {error}") from error
    if found["is_measured"] != (found["fit_error"] is None):
        raise DataError(f"{where}, column fit_error: measured rows have none, predicted rows have one.")
    return ProfileRow(**found)


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty.")
    return text


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false.")
    return text == "true"


def _count(text: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{text!r} is no whole number ≥ {least}.")
    return int(text)


def _number(text: str, least: float | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    is_within = value > 0 if least is None else value >= least
    if not math.isfinite(value) or not is_within:
        raise ValueError(f"{text!r} is no number {'> 0' if least is None else f'≥ {least:g}'}.")
    return value


def _optional(text: str) -> float | None:
    return None if text == "" else _number(text, 0.0)


def _subnet(text: str) -> str:
    return str(Subnet.parse(text))


def _day(text: str) -> str:
    return date.fromisoformat(text).isoformat()


_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("device", "runtime", "precision", "family", "poa_version"), _text),
    **dict.fromkeys(("num_threads", "batch_size", "image_size", "num_params"), _count),
    "flops": partial(_count, least=0),
    **dict.fromkeys(("latency_ms", "latency_p95_ms", "throughput", "file_size_mb"), _number),
    **dict.fromkeys(("peak_memory_mb", "fit_error"), _optional),
    "subnet": _subnet,
    "is_measured": _truth,
    "date": _day,
}

if set(COLUMNS) != {each.name for each in fields(ProfileRow)} or set(KEY) != {*Setting._fields, "subnet"}:
    raise AssertionError("the kit and the table have other columns.")
