"""`poa evaluate pictures`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import NetworkOptions
from poa.config import DataConfig
from poa.evaluate.features import Loading
from poa.evaluate.pictures import GalleryConfig, write_gallery

if TYPE_CHECKING:
    from poa.data import ImageSource
    from poa.evaluate.pictures.gallery import OnProgress
    from poa.objective.heads import ProjectionHeads


@dataclass(frozen=True)
class PictureNetworks(NetworkOptions):
    """Which networks, and where they compute."""

    subnets: tuple[str, ...] = ("smallest", "middle", "intact")
    """Of families: names like w384-d12; all, smallest, middle, intact."""

    def heads(self) -> ProjectionHeads | None:
        """The projection heads of the run whose sub-networks these are; None where there is no such run."""
        from poa.train.heads import load_heads

        return load_heads(self.networks[0]) if len(set(self.networks)) == 1 and not self.untrained else None


@dataclass(frozen=True)
class ShownImages:
    """Which images."""

    images: str
    """A folder of images, a .parquet file, or digits:test; labels, where it has them, colour the map."""
    image_column: str = "image"
    """Parquet: the column with the encoded images."""
    label_column: str = "label"
    """Parquet: the column with the labels."""
    max_bad_share: float = 0.01
    """Refuse when more than this share of the images cannot be read; below, they are left out and reported."""

    def open(self, num_channels: int) -> ImageSource:
        """The images."""
        from poa.data import open_source

        data = DataConfig("", self.image_column, self.label_column, self.max_bad_share)
        return open_source(self.images, data, num_channels)


@dataclass(frozen=True)
class EvaluatePictures:
    """Show what shrinking loses: attention, patches in colour, matches, prototypes and a map on one page."""

    over: OmitArgPrefixes[PictureNetworks]
    of: OmitArgPrefixes[ShownImages]
    out: Path
    """The directory for the pictures (PNG) and the page that shows them, index.html."""
    drawing: OmitArgPrefixes[GalleryConfig] = field(default_factory=GalleryConfig)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(
        EvaluatePictures,
        prog="poa evaluate pictures",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    networks, runtime = command.over.open()
    source = command.of.open(networks[0].preprocessing.num_channels)
    loading = Loading(command.over.batch_size, runtime.num_workers, command.of.max_bad_share)
    with _bars() as on_progress:
        page = write_gallery(
            command.out,
            networks,
            source,
            command.drawing,
            heads=command.over.heads(),
            loading=loading,
            on_progress=on_progress,
        )
    Console().print(f"The page: {page}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _bars() -> Iterator[OnProgress]:
    """A bar for everything that is reported."""
    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report
