"""What evaluations give: results, and the tables written from them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poa.data import SkippedImage
from poa.errors import DataError
from poa.files import json_value, write_json, write_text


@dataclass(frozen=True)
class Result:
    """The figures of one network under one protocol."""

    protocol: str
    network: str
    source: str
    num_params: int
    flops: int | None
    figures: dict[str, float]
    """By name; shares are 0-1."""
    headline: str
    """The name of the figure that stands for the protocol."""
    key: str = ""
    """Tells results with other weights or other numbers of the protocol apart."""

    @property
    def value(self) -> float:
        """The figure that stands for the protocol."""
        return self.figures[self.headline]


@dataclass(frozen=True)
class Report:
    """The results of an evaluation."""

    results: tuple[Result, ...]
    num_train: int
    num_test: int
    skipped: tuple[SkippedImage, ...]
    """The images that could not be read."""

    def of(self, protocol: str) -> list[Result]:
        """The results of one protocol, in the order of the networks."""
        return [result for result in self.results if result.protocol == protocol]


def table_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each network: name, source, parameters, operations, and a column PROTOCOL/FIGURE for each figure."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        fixed = {key: getattr(result, key) for key in ("network", "source", "num_params", "flops")}
        row = rows.setdefault((result.source, result.network), fixed)
        row.update({f"{result.protocol}/{name}": value for name, value in result.figures.items()})
    return list(rows.values())


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Writes `table_rows` as CSV; what a network lacks is left empty."""
    rows = table_rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_parquet(path: Path, results: Iterable[Result]) -> None:
    """Writes `table_rows` as Parquet.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError('Parquet files need pyarrow, which is not installed: pip install "poa[parquet]"') from error
    rows = table_rows(results)
    columns = _columns(rows)
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    scratch = path.with_name(path.name + ".tmp")
    parquet.write_table(table, scratch)
    scratch.replace(path)


def write_results(path: Path, report: Report, described: Mapping[str, Any]) -> None:
    """Writes everything as JSON: what was asked, the results, what was left out. Figures that are no number are null.

    Raises:
        DataError: the file cannot be written.
    """
    value = {
        **described,
        "num_train": report.num_train,
        "num_test": report.num_test,
        "results": [asdict(result) for result in report.results],
        "skipped": [image._asdict() for image in report.skipped],
    }
    try:
        write_json(path, _plain(value))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}.") from error


def read_results(lines: Iterable[str]) -> list[Result]:
    """The results written one to a line, as `json.dumps(asdict(result))`.

    Raises:
        DataError: a line holds no result.
    """
    try:
        found = [Result(**json_value(line)) for line in lines if line.strip()]
        for result in found:
            float(result.value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the results are damaged: {error!r}. Give another --out.") from error
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _plain(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | bool | str | None) else str(value)
