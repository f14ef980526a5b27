"""`poa data index`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.data import shards_in_words
from poa.cli.progress import bars
from poa.cli.reading import ColumnOptions
from poa.config import DataConfig
from poa.errors import ConfigError
from poa.files import check_writable


@dataclass(frozen=True)
class DataIndex:
    """Make the index of shards that are there: where every image lies, its label, every shard's size and SHA-256.

    Training needs it for remote shards, and to shuffle shards with bounded memory. Every shard is read once; a remote
    one is fetched and removed again.
    """

    shards: Annotated[str, tyro.conf.Positional]
    """A .tar or .parquet file, a folder of them or a pattern like shards-{0000..0009}.tar, local or under a URL."""
    out: Path | None = None
    """The file to write; by default poa-index.safetensors beside the shards, where they are local."""
    columns: OmitArgPrefixes[ColumnOptions] = field(default_factory=ColumnOptions)
    max_bad_share: float = DataConfig.max_bad_share
    """Refuse when more than this share of the images are unusable; below, they are left out and told."""
    cache_dir: str = DataConfig.cache_dir
    """Where remote shards are put while they are read, one at a time."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(DataIndex, prog="poa data index", args=list(arguments))
    from poa.data.shards import INDEX_NAME, build_index, locate
    from poa.data.sources import check_bad_share
    from poa.data.tools import with_class_names

    location, out = locate(command.shards), command.out
    if out is None:
        if not location.is_local:
            raise ConfigError(
                f"the shards are remote: say by --out where the index goes, --out {INDEX_NAME} for example."
            )
        out = Path(location.base) / INDEX_NAME
    check_writable(out)
    config = DataConfig(max_bad_share=command.max_bad_share, cache_dir=command.cache_dir, **asdict(command.columns))
    with bars() as shown:
        index = build_index(command.shards, config, lambda *at: shown.show("shards", *at[1:]))
    check_bad_share(index.skipped, len(index) + len(index.skipped), config.max_bad_share, option="--max-bad-share")
    if location.is_local:
        index = with_class_names(index, Path(location.base))
    index.save(out)
    for bad in index.skipped[:10]:
        print(f"left out: {bad.name}: {bad.reason}", file=sys.stderr)
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    print(
        f"{len(index):,} images in {shards_in_words(len(index.shards), num_bytes)}; "
        f"{len(index.skipped):,} left out; the index: {out}"
    )
    return 0
