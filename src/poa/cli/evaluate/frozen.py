"""`poa evaluate knn`, `linear`, …: one registered evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import (
    ImageOptions,
    NetworkOptions,
    check_outputs,
    loading_of,
    print_results,
    progress_bars,
    report_skipped,
    require_used,
    title_of,
)
from poa.config import to_dict
from poa.evaluate import Evaluator, Report, Result, evaluate, split
from poa.evaluate.registry import EVALUATORS
from poa.evaluate.report import write_csv, write_results

FIGURE_LABELS = {
    "accuracy": ("accuracy, %", 100.0),
    "map": ("mean average precision, %", 100.0),
    "nmi": ("normalised mutual information", 1.0),
    "cka": ("CKA with the intact network", 1.0),
}
"""How pictures word headlines, and what they multiply them with; others are drawn as they are."""

EvaluatorT = TypeVar("EvaluatorT", bound=Evaluator)


@dataclass(frozen=True)
class EvaluateFrozen(Generic[EvaluatorT]):
    """Measure frozen networks; every image is decoded once for all of them."""

    network: OmitArgPrefixes[NetworkOptions]
    image: OmitArgPrefixes[ImageOptions]
    protocol: Annotated[EvaluatorT, OmitArgPrefixes]
    json: Path | None = None
    """Write everything to this JSON file too."""
    csv: Path | None = None
    """Write the table to this CSV file too."""
    picture: Path | None = None
    """Draw the main figure against the parameters into this PNG file."""


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs the command."""
    kind: Any = EvaluateFrozen[EVALUATORS[name]]  # type: ignore[valid-type]
    command: EvaluateFrozen[Any] = tyro.cli(kind, prog=f"poa evaluate {name}", args=list(arguments))
    check_outputs(command.json, command.csv, command.picture)
    require_used(command.image, [command.protocol])
    networks, runtime = command.network.open()
    train, test = command.image.open(networks[0].preprocessing.num_channels)
    data = split(train, test, [command.protocol], command.image.split_seed)
    with progress_bars(data) as on_progress:
        loading = loading_of(command.network, command.image, runtime)
        report = evaluate([command.protocol], networks, data, loading=loading, on_progress=on_progress)
    report_skipped(report.skipped)
    looks = f", {1 + len(command.protocol.test_looks)} looks at them" if command.protocol.test_looks else ""
    print_results(report.results, title_of(name, report.num_train, report.num_test) + looks)
    _write(command, name, report)
    return 0


def _write(command: EvaluateFrozen[Any], name: str, report: Report) -> None:
    if command.json is not None:
        described = {"protocol": name, "options": to_dict(command.protocol), "data": to_dict(command.image)}
        write_results(command.json, report, described)
    if command.csv is not None:
        write_csv(command.csv, report.results)
    if command.picture is not None:
        draw_picture(command.picture, report.results)


def draw_picture(path: Path, results: Sequence[Result]) -> None:
    """Draws the protocol's own picture, or its main figure against the parameters."""
    if EVALUATORS[results[0].protocol].draw(path, results):
        return
    from poa.evaluate.plots import save_front

    protocol, headline = results[0].protocol, results[0].headline
    label, scale = FIGURE_LABELS.get(headline, (headline, 1.0))
    save_front(path, results, f"{protocol}: {label}", scale)
