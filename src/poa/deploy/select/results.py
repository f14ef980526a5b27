"""The quality of a family's sub-networks, from the tables that `poa evaluate` and `poa finetune` write."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from poa.errors import CheckpointError, ConfigError, DataError
from poa.family import FamilyCard, read_card

HEADLINES = {
    "knn": "accuracy",
    "linear": "accuracy",
    "logistic": "accuracy",
    "fewshot": "accuracy",
    "retrieval": "map",
    "clustering": "nmi",
    "health": "cka",
    "robustness": "accuracy_damaged",
    "segment-linear": "miou",
    "segment-upernet": "miou",
    "detect": "AP",
    "finetune": "accuracy",
}
"""The figure that stands for a protocol: `Evaluator.headline` of the registered ones, without importing torch."""
NO_QUALITY = {
    *("alignment", "uniformity", "cross_entropy", "binary_cross_entropy"),
    *("learning_rate", "num_blocks", "pooled", "c", "queries_left_out"),
}
"""Figures of the tables of which more is not better."""


@dataclass(frozen=True)
class ResultRow:
    """The figures of one network in a table of results."""

    file: Path
    line: int
    network: str
    source: str
    num_params: int
    figures: dict[str, float]
    """By column, PROTOCOL/FIGURE; those that are missing or no number are left out."""


@dataclass(frozen=True)
class Quality:
    """One figure of the sub-networks of one family."""

    column: str
    values: dict[str, float]
    """By the name of the sub-network."""
    others: tuple[str, ...]
    """Networks in the tables that are none of the family's sub-networks, or have other weights."""


def read_results(path: Path) -> tuple[ResultRow, ...]:
    """The rows of a table that `poa evaluate` wrote.

    Raises:
        DataError: there is no such file, it is no such table, or a value is no number (line and column are named).
    """
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), restval="")
        rows = [(table.line_num, row) for row in table]
    except OSError as error:
        raise DataError(
            f"cannot read the results {path}: {error.strerror}. `poa evaluate sweep` writes some."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table of results: it is not CSV in UTF-8 ({error}).") from error
    if not rows or not {"network", "source", "num_params"} <= set(table.fieldnames or ()):
        raise DataError(
            f"{path} is no table of results: the columns network, source and num_params, and a row below them, are "
            "needed. `poa evaluate sweep --out DIR` writes DIR/results.csv."
        )
    return tuple(_result_row(path, line, row) for line, row in rows)


def quality_of(card: FamilyCard, sizes: Mapping[str, int], files: Sequence[Path], name: str | None) -> Quality:
    """The figure that `name` names, of the family's sub-networks.

    Networks of other families, networks with fresh weights and single models are left out. A network is the family's
    if its name and parameters are; where its source is a family that can be read, the weights must be the same too.

    Args:
        card: the family's.
        sizes: parameters of its sub-networks, by name.
        files: tables of results.
        name: a protocol (its headline), PROTOCOL/FIGURE, or a FIGURE that one protocol gives; None: the only headline
            that there is.

    Raises:
        ConfigError: no figure has that name, or several have; valid names are given.
        DataError: a table cannot be read or has nothing of this family, or tables contradict each other.
    """
    rows = [row for file in files for row in read_results(file)]
    about = {source: _columns_about(card, source) for source in {row.source for row in rows}}
    ours: list[ResultRow] = []
    others: dict[str, None] = {}
    for row in rows:
        figures = {column: value for column, value in row.figures.items() if column.startswith(about[row.source])}
        if figures and sizes.get(_member(row.network)) == row.num_params:
            ours.append(replace(row, figures=figures))
        else:
            others[row.network] = None
    if not ours:
        raise DataError(_foreign(card, files, rows))
    column = find_column(name, list(dict.fromkeys(column for row in ours for column in row.figures)))
    values: dict[str, ResultRow] = {}
    for row in ours:
        if column not in row.figures:
            continue
        first = values.setdefault(_member(row.network), row)
        if first.figures[column] != row.figures[column]:
            raise DataError(
                f"{column} of {_member(row.network)} is {first.figures[column]:g} in {first.file}, line {first.line}, "
                f"and {row.figures[column]:g} in {row.file}, line {row.line}. Give one table for each figure."
            )
    return Quality(column, {name: row.figures[column] for name, row in values.items()}, tuple(others))


def is_quality(column: str) -> bool:
    """Whether more is better of the column PROTOCOL/FIGURE."""
    figure = column.partition("/")[2]
    return figure not in NO_QUALITY and not figure.endswith("_sd")


def find_column(name: str | None, columns: Sequence[str]) -> str:
    """The column that a name stands for.

    Raises:
        ConfigError: none or several, or one of which more is not better; valid names are given.
    """
    useful = [column for column in columns if is_quality(column)]
    headlines = {column.partition("/")[0]: column for column in useful if _is_headline(column)}
    valid = _valid(headlines, useful)
    if name is None:
        if len(headlines) == 1:
            return next(iter(headlines.values()))
        raise ConfigError(f"the results hold several figures. Choose with --quality: {valid}.")
    if name in useful or name in headlines:
        return headlines.get(name, name)
    found = [each for each in useful if each.partition("/")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--quality {name}: several protocols give it. Choose one: {', '.join(found)}.")
    if any(name in (each, each.partition("/")[2]) for each in columns):
        raise ConfigError(f"--quality {name}: more of it is not better. Choose one of: {valid}.")
    figures = [each.partition("/")[2] for each in useful]
    close = difflib.get_close_matches(name, dict.fromkeys((*headlines, *useful, *figures)), n=3)
    hint = f" Nearest: {', '.join(close)}." if close else ""
    raise ConfigError(f"--quality {name}: the results have no such figure.{hint} They have: {valid}.")


def _valid(headlines: Iterable[str], columns: Sequence[str], num_shown: int = 12) -> str:
    listed = list(dict.fromkeys((*headlines, *columns)))
    rest = f" and {len(listed) - num_shown} more columns" if len(listed) > num_shown else ""
    return (", ".join(listed[:num_shown]) or "nothing that could be compared") + rest


def _is_headline(column: str) -> bool:
    protocol, _, figure = column.partition("/")
    multi_label = protocol == "finetune" and figure == "map"
    return HEADLINES.get(protocol) == figure or multi_label


def _member(network: str) -> str:
    """The sub-network of `FAMILY/w384-d12`; fresh weights (`… untrained`) are no sub-network."""
    return network.rpartition("/")[2]


def _columns_about(card: FamilyCard, source: str) -> str | tuple[str, ...]:
    """What the columns begin with that are of this family in rows of that source.

    All (""), unless the source is known to be another family: then none. A table of `poa finetune --elastic` names the
    family that training began with; its columns are of the classifier too.
    """
    try:
        if read_card(source).weights_sha256 == card.weights_sha256:
            return ""
    except CheckpointError:
        if source != _began_with(card):
            return ""
    return "finetune/" if source == _began_with(card) else ()


def _began_with(card: FamilyCard) -> str | None:
    found: str | None = card.provenance.get("finetuned", {}).get("source")
    return found


def _foreign(card: FamilyCard, files: Sequence[Path], rows: Sequence[ResultRow]) -> str:
    networks = ", ".join(dict.fromkeys(row.network for row in rows[:3]))
    sources = ", ".join(dict.fromkeys(row.source for row in rows))
    return (
        f"{', '.join(map(str, files))}: nothing of this family, whose sub-networks are {card.space.smallest} to "
        f"{card.space.intact}; there are {networks}, … of {sources}. Give the table of `poa evaluate sweep` on this "
        "family."
    )


def _result_row(path: Path, line: int, row: dict[str, str]) -> ResultRow:
    where = f"{path}, line {line}"
    if None in row:
        raise DataError(f"{where}: more values than columns.")
    if not row["num_params"].isdigit():
        raise DataError(f"{where}, column num_params: {row['num_params']!r} is no whole number.")
    found = {}
    for column, text in row.items():
        if "/" in column and text.strip():
            try:
                value = float(text)
            except ValueError as error:
                raise DataError(f"{where}, column {column}: {text!r} is no number.") from error
            if math.isfinite(value):
                found[column] = value
    return ResultRow(path, line, row["network"], row["source"], int(row["num_params"]), found)
