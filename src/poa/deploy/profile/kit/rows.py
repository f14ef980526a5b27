"""The table as text: what its columns are, and how rows are merged and written."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

COLUMNS = (
    "device",
    "runtime",
    "precision",
    "num_threads",
    "batch_size",
    "image_size",
    "subnet",
    "is_measured",
    "latency_ms",
    "latency_p95_ms",
    "throughput",
    "peak_memory_mb",
    "num_params",
    "flops",
    "file_size_mb",
    "fit_error",
    "family",
    "date",
    "poa_version",
)
"""Of the table, in order."""
KEY = ("device", "runtime", "precision", "num_threads", "batch_size", "image_size", "family", "subnet")
"""The columns that tell rows apart; all but the last are the setting."""

Row = Mapping[str, str]
"""A row as it stands in the file: text by column."""


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The rows of both: a new row replaces the old one of its key, but no predicted row replaces a measured one.

    Settings stay in their order; within one the network with the fewest parameters is first.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for row in (*old, *new):
        key = tuple(row[name] for name in KEY)
        if key in rows and rows[key]["is_measured"] == "true" and row["is_measured"] != "true":
            continue
        rows[key] = row
    settings = {setting: index for index, setting in enumerate(dict.fromkeys(key[:-1] for key in rows))}
    order = sorted(rows, key=lambda key: (settings[key[:-1]], int(rows[key]["num_params"]), key))
    return [rows[key] for key in order]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, their values unchecked; none if there is no such file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(COLUMNS):
            raise ValueError(f"{path} is no profile: its columns are others. Name another file.")
        return list(reader)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes the table, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def text_of(value: object) -> str:
    """A value as it stands in the table: empty for None, `true` or `false`, numbers without loss."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def measured_subnets(rows: Iterable[Row], setting: Row) -> set[str]:
    """The sub-networks that are measured in that setting already."""
    columns = [name for name in KEY if name != "subnet"]
    return {
        row["subnet"]
        for row in rows
        if row["is_measured"] == "true" and all(row[name] == setting[name] for name in columns)
    }
