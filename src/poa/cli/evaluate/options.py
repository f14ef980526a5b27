"""What the commands of `poa evaluate` have in common: options, opening, progress, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.config import RuntimeConfig
from poa.errors import ConfigError

if TYPE_CHECKING:
    from poa.data import ImageSource, SkippedImage
    from poa.evaluate import Evaluator, Loading, Result, Splits
    from poa.models import Candidate
    from poa.runtime import Runtime


@dataclass(frozen=True)
class NetworkChoice:
    """Which networks, and where they compute."""

    networks: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Runs or families of poa, directories in timm's format, or timm:NAME."""
    subnets: tuple[str, ...] = ("all",)
    """Of families: names like w384-d12; all, smallest, middle, intact."""
    untrained: bool = False
    """Measure the same networks with fresh weights too, to compare with."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA where there is one, else MPS, else the CPU."""
    num_workers: int = -1
    """Processes that decode; -1 chooses."""
    weights_seed: int = 0
    """Of the fresh weights of --untrained."""

    def open(self) -> tuple[list[Candidate], Runtime]:
        """The networks on their device, and where they compute."""
        from poa.models import open_models
        from poa.runtime import resolve_runtime

        if not self.subnets:
            raise ConfigError("--subnets names none. Give names like w384-d12, or all, smallest, middle, intact.")
        if self.weights_seed and not self.untrained:
            raise ConfigError("--weights-seed is of the fresh weights of --untrained, which is not given.")
        runtime = resolve_runtime(RuntimeConfig(device=self.device, num_workers=self.num_workers))
        found = open_models(self.networks, self.subnets)
        if self.untrained:
            found += open_models(self.networks, self.subnets, untrained_seed=self.weights_seed)
        for network in found:
            network.to(runtime.device)
        return found, runtime


@dataclass(frozen=True)
class NetworkOptions(NetworkChoice):
    """Which networks, and how they compute."""

    batch_size: int = 64
    """Images per forward pass."""


@dataclass(frozen=True)
class ImageOptions:
    """Which images."""

    train: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    """Images to learn from: a folder with one folder for each class, .parquet or .tar files, or digits:train."""
    test: str | None = None
    """Images to test on; without them a fifth of every class of --train is held out, where a protocol needs them."""
    split_seed: int = 0
    """Of the images that are held out where there is no --test."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)

    def open(self, num_channels: int) -> tuple[ImageSource, ImageSource | None]:
        """The training and the test images."""
        from poa.data import open_source

        if self.split_seed and self.test is not None:
            raise ConfigError("--split-seed is of the images that are held out without --test; leave one of them out.")
        data = self.reading.config()
        train = open_source(self.train, data, num_channels)
        return train, None if self.test is None else open_source(self.test, data, num_channels)


def loading_of(networks: NetworkOptions, images: ImageOptions, runtime: Runtime) -> Loading:
    """How images are read."""
    from poa.evaluate import Loading

    return Loading(networks.batch_size, runtime.num_workers, images.reading.max_bad_share)


@contextmanager
def progress_bars(data: Splits) -> Iterator[Callable[[str, int], None]]:
    """Bars for the training and the test images."""
    totals = {"train": data.num_train, "test": data.num_test}
    with bars() as shown:
        yield lambda name, done: shown.show(name, done, totals[name])


def require_used(images: ImageOptions, protocols: Sequence[Evaluator]) -> None:
    """Refuses --test where no protocol would look at it.

    Raises:
        ConfigError: so it is.
    """
    if images.test is not None and not any(protocol.needs_test for protocol in protocols):
        names = ", ".join(protocol.name for protocol in protocols)
        raise ConfigError(f"--test {images.test} would not be used: {names} looks at the images of --train alone.")


def title_of(protocol: str, num_train: int, num_test: int) -> str:
    """A table's title."""
    if not num_test:
        return f"{protocol}, {num_train:,} images"
    return f"{protocol}, {num_train:,} training and {num_test:,} test images"


def report_skipped(skipped: Sequence[SkippedImage]) -> None:
    """Says which images were left out."""
    for bad in skipped:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)


def print_results(results: Sequence[Result], title: str) -> None:
    """A table with a row for each network and a column for each figure, as many as the terminal is wide."""
    console, table = Console(), Table(title=title)
    columns = {
        "network": [each.network for each in results],
        "parameters": [f"{each.num_params:,}" for each in results],
    }
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    for name in names:
        if name.removesuffix("_sd") == name or name.removesuffix("_sd") not in names:
            columns[name] = [_cell(result, name) for result in results]
    widths = [3 + max(len(name), *map(len, cells)) for name, cells in columns.items()]
    num_shown = max(3, sum(total < console.width for total in accumulate(widths)))
    for name in list(columns)[:num_shown]:
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for row in zip(*list(columns.values())[:num_shown], strict=True):
        table.add_row(*row)
    console.print(table)
    if len(columns) > num_shown:
        left_out = ", ".join(list(columns)[num_shown:])
        console.print(f"In the files, not here: {left_out}.", highlight=False, soft_wrap=True)


def _cell(result: Result, name: str) -> str:
    spread = result.figures.get(f"{name}_sd")
    value = formatted(result.figures.get(name))
    return value if spread is None else f"{value} ± {spread:.2g}"


def formatted(value: float | None) -> str:
    """A figure for a table."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def check_outputs(*paths: Path | None) -> None:
    """Refuses files that cannot be written, before work starts."""
    from poa.files import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)
