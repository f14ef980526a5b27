"""`poa evaluate pictures`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from poa.cli.evaluate.options import NetworkOptions
from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.evaluate.features import Loading
from poa.evaluate.pictures import GalleryConfig, write_gallery

if TYPE_CHECKING:
    from poa.data import ImageSource
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
    """A folder of images, .parquet or .tar files, or digits:test; labels, where it has them, colour the map."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)

    def open(self, num_channels: int) -> ImageSource:
        """The images."""
        from poa.data import open_source

        return open_source(self.images, self.reading.config(), num_channels)


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
    loading = Loading(command.over.batch_size, runtime.num_workers, command.of.reading.max_bad_share)
    with bars() as shown:
        page = write_gallery(
            command.out,
            networks,
            source,
            command.drawing,
            heads=command.over.heads(),
            loading=loading,
            on_progress=shown.show,
        )
    Console().print(f"The page: {page}", highlight=False, soft_wrap=True)
    return 0
