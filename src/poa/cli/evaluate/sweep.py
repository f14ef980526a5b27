"""`poa evaluate sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.frozen import draw_picture
from poa.cli.evaluate.options import (
    ImageOptions,
    NetworkOptions,
    loading_of,
    print_results,
    progress_bars,
    report_skipped,
    require_used,
    title_of,
)
from poa.config import from_dict, load_yaml
from poa.errors import ConfigError
from poa.evaluate import Evaluator, split, sweep
from poa.evaluate.registry import EVALUATORS
from poa.evaluate.report import write_parquet


@dataclass(frozen=True)
class EvaluateSweep:
    """Run several protocols over many networks into one table. Stopped, the same command goes on."""

    network: OmitArgPrefixes[NetworkOptions]
    image: OmitArgPrefixes[ImageOptions]
    out: Path
    """The directory for the table, the pictures and, while it runs, the vectors."""
    protocols: tuple[str, ...] = ("knn", "linear")
    """Names of protocols on frozen features (`poa evaluate --help` lists them)."""
    config: Path | None = None
    """A YAML file with options of protocols, for example `knn: {k: [20]}`."""
    parquet: bool = False
    """Write the table as results.parquet too."""
    keep_features: bool = False
    """Leave the vectors in the directory, for a later sweep with more protocols."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(
        EvaluateSweep, prog="poa evaluate sweep", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )
    protocols = chosen(command.protocols, command.config)
    require_used(command.image, protocols)
    networks, runtime = command.network.open()
    train, test = command.image.open(networks[0].preprocessing.num_channels)
    data = split(train, test, protocols, command.image.split_seed)
    with progress_bars(data) as on_progress:
        found = sweep(
            protocols,
            networks,
            data,
            command.out,
            loading=loading_of(command.network, command.image, runtime),
            keep_features=command.keep_features,
            on_progress=on_progress,
        )
    report_skipped(found.report.skipped)
    if found.num_known:
        print(f"{found.num_known} results were there already.")
    if command.parquet:
        write_parquet(command.out / "results.parquet", found.report.results)
    for protocol in protocols:
        results = found.report.of(protocol.name)
        print_results(results, title_of(protocol.name, data.num_train, data.num_test if protocol.needs_test else 0))
        draw_picture(command.out / f"{protocol.name}.png", results)
    Console().print(f"The table: {found.csv}\nEverything: {found.json}", highlight=False, soft_wrap=True)
    return 0


def chosen(names: Sequence[str], config: Path | None) -> list[Evaluator]:
    """The protocols of those names, with their options from the file.

    Raises:
        ConfigError: there is no such protocol, or the file has options that it has not.
    """
    options: dict[str, Any] = {} if config is None else load_yaml(config)
    unknown = [name for name in (*names, *options) if name not in EVALUATORS]
    if unknown or not names:
        what = f"there is no protocol {unknown[0]!r}" if unknown else "no protocol is named"
        raise ConfigError(f"{what}. Protocols: {', '.join(EVALUATORS)}.")
    left_over = [name for name in options if name not in names]
    if left_over:
        raise ConfigError(f"{config} has options of {', '.join(left_over)}, which --protocols does not name.")
    return [from_dict(EVALUATORS[name], options.get(name) or {}, f"{config}: {name}") for name in dict.fromkeys(names)]
