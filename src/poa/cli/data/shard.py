"""`poa data shard`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.data import shards_in_words
from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.data.tools import ShardOptions, Written, write_shards


@dataclass(frozen=True)
class DataShard:
    """Convert images from anywhere into shards, each a fair sample of all.

    The image files' bytes stay as they are, and so do the labels. Images that cannot be read are left out and listed.
    A call that was stopped goes on when it is given again; the shards are the same to the last bit in any case.
    """

    images: Annotated[str, tyro.conf.Positional]
    """A folder of images, .parquet or .tar files, a pattern like shards-{0000..0009}.tar, local or under a URL."""
    out: Path
    """The folder for the shards, their index, and the lists of where every image came from and of those left out."""
    options: OmitArgPrefixes[ShardOptions] = field(default_factory=ShardOptions)
    num_workers: int = -1
    """Processes that read and decode; -1 chooses. They change nothing of the result."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(DataShard, prog="poa data shard", args=list(arguments))
    from poa.data import open_source, resolve_num_workers

    config = command.reading.config()
    # What cannot be used already in the listing counts as what does not decode.
    source = open_source(command.images, replace(config, max_bad_share=1.0), 3, in_order=True)
    try:
        with bars() as shown:
            written = write_shards(
                source,
                command.out,
                command.options,
                config=config,
                num_workers=resolve_num_workers(command.num_workers, "cpu"),
                on_progress=shown.show,
            )
    except KeyboardInterrupt:
        print("stopped. What is written stays; the same command goes on from there.", file=sys.stderr)
        return 130
    _tell(written, command.out)
    return 0


def _tell(written: Written, out: Path) -> None:
    for bad in written.skipped[:10]:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
    if len(written.skipped) > 10:
        print(f"left out: {len(written.skipped) - 10:,} more, listed in {out / 'skipped.jsonl'}", file=sys.stderr)
    what = f"{written.num_images:,} images in {shards_in_words(len(written.files), written.num_bytes)}"
    print(f"{out} was complete already: {what}." if written.was_there else f"{what}, written to {out}.")
    print(f"Train on them: poa pretrain --data {out}")
