"""`poa evaluate PROTOCOL`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from poa.config import DataConfig, RuntimeConfig
from poa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from poa.evaluate import KnnReport

PROTOCOLS = ("knn",)


@dataclass(frozen=True)
class EvaluateKnn:
    """Weighted k-nearest-neighbour accuracy of many sub-networks; every image is decoded once for all of them."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory or a family directory."""
    train: str
    """Labelled images that vote: a folder with one folder for each class, a .parquet file, or digits:train."""
    test: str
    """Labelled images to classify."""
    subnets: tuple[str, ...] = ("all",)
    """Names like w384-d12; all, smallest, middle, intact."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temp: float = 0.07
    """Temperature of the votes."""
    json: Path | None = None
    """Write the results to this JSON file too."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA where there is one, else MPS, else the CPU."""
    batch_size: int = 64
    """Images per forward pass."""
    num_workers: int = -1
    """Processes that decode; -1 chooses."""
    image_column: str = "image"
    """Parquet: the column with the encoded images."""
    label_column: str = "label"
    """Parquet: the column with the labels."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images cannot be read."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: poa evaluate PROTOCOL PATH [OPTIONS]\n\nprotocols:\n  knn   weighted k-nearest neighbours")
        return 0
    if arguments[0] not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {arguments[0]!r}. Protocols: {', '.join(PROTOCOLS)}.")
    return _knn(tyro.cli(EvaluateKnn, prog="poa evaluate knn", args=list(arguments[1:])))


def _knn(command: EvaluateKnn) -> int:
    from poa.data import open_source
    from poa.evaluate import KnnConfig, Loading, evaluate_knn
    from poa.family import load
    from poa.files import check_writable
    from poa.runtime import resolve_runtime

    if command.json is not None:
        check_writable(command.json)
    family = load(command.path)
    subnets = family.space.parse_all(command.subnets)
    if not subnets:
        raise ConfigError("--subnets names none. Give names like w384-d12, or all, smallest, middle, intact.")
    knn = KnnConfig(command.k, command.temp)
    runtime = resolve_runtime(RuntimeConfig(device=command.device, num_workers=command.num_workers))
    loading = Loading(command.batch_size, runtime.num_workers, command.max_bad_share)
    data = DataConfig("", command.image_column, command.label_column, command.max_bad_share)
    num_channels = family.card.preprocessing.num_channels
    train, test = (open_source(spec, data, num_channels, require_labels=True) for spec in (command.train, command.test))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=len(part)) for name, part in (("train", train), ("test", test))}
        report = evaluate_knn(
            family.to(runtime.device),
            train,
            test,
            subnets,
            knn=knn,
            loading=loading,
            on_progress=lambda name, done: progress.update(tasks[name], completed=done),
        )
    for bad in report.skipped:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
    _print_table(report)
    if command.json is not None:
        _write_json(command, report)
    return 0


def _print_table(report: KnnReport) -> None:
    table = Table(title=f"k-NN, {report.num_train:,} training and {report.num_test:,} test images")
    table.add_column("sub-network")
    table.add_column("parameters", justify="right")
    ks = list(report.results[0].accuracy)
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for result in report.results:
        cells = [f"{result.accuracy[k]:.2%}" for k in ks]
        table.add_row(result.subnet, f"{result.num_params:,}", *cells)
    Console().print(table)


def _write_json(command: EvaluateKnn, report: KnnReport) -> None:
    from poa.files import write_json

    value = {
        "protocol": "knn",
        "path": str(command.path),
        "train": command.train,
        "test": command.test,
        "temp": command.temp,
        **asdict(report),
    }
    try:
        write_json(command.json, json.loads(json.dumps(value)))  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"cannot write {command.json}: {error.strerror}.") from error
