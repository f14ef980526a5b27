"""Making the index of a set of shards, one shard after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from poa.config import DataConfig
from poa.data.base import SkippedImage
from poa.data.parquet import arrow, check_class_names, class_names_of, has_bytes, labels_of, row_groups
from poa.data.shards.fetch import DiskFull, fetch, filesystem_of
from poa.data.shards.index import Shard, ShardIndex
from poa.data.shards.location import Location, check_name, kind_of, locate, redacted
from poa.data.tar_index import TarIndex, tar_files
from poa.errors import DataError
from poa.files import file_sha256

Progress = Callable[[str, int, int], None]
"""Is told a shard's name, how many are done and how many there are."""


def build_index(spec: str, config: DataConfig, progress: Progress | None = None) -> ShardIndex:
    """The index of the shards that a spec names; each is fetched where it is not local, read once and removed again.

    Args:
        spec: a .tar or .parquet file, a pattern like `shards-{0000..0009}.tar`, or a folder; local or a URL.
        config: columns, limits, how to fetch, and `cache_dir`, where one shard at a time is put.
        progress: is told how far it is.

    Raises:
        DataError: there are no shards, one cannot be read, or they hold no image.
    """
    location = with_names(locate(spec), config)
    kinds = {kind_of(name) for name in location.names}
    if kinds not in ({"tar"}, {"parquet"}):
        raise DataError(f"{spec!r} has .tar and .parquet shards. Give those of one kind at a time.")
    walk = _Walk(location, config, progress)
    index = _index_of_tars(walk) if kinds == {"tar"} else _index_of_parquet(walk)
    if not len(index):
        raise DataError(f"no images found in the {len(index.shards)} shards of {spec!r}.")
    return index


def with_names(location: Location, config: DataConfig) -> Location:
    """The location with the names of its shards in order; a folder is listed where they are not given.

    Raises:
        DataError: the folder cannot be listed or has no shards, or a name is not safe.
    """
    names = location.names
    if not names:
        names = _local_names(Path(location.base)) if location.is_local else _remote_names(location.base, config)
        names = tuple(name for name in names if kind_of(name) is not None)
        if not names:
            raise DataError(f"there are no .tar or .parquet shards in {redacted(location.base)}.")
    for name in names:
        check_name(name, redacted(location.base))
    return replace(location, names=tuple(sorted(set(names))))


def _local_names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise DataError(f"the folder {redacted(str(folder))} cannot be listed: {error.strerror}.") from error


def _remote_names(base: str, config: DataConfig) -> tuple[str, ...]:
    filesystem, path = filesystem_of(base, config.stall_seconds)
    try:
        entries = filesystem.ls(path, detail=False)
    except Exception as error:
        raise DataError(
            f"{redacted(base)} cannot be listed ({redacted(str(error))[:200]}). Name the shards by a pattern like "
            f"shards-{{0000..0199}}.tar."
        ) from error
    return tuple(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)


@dataclass
class _Walk:
    """The shards as local files, one after the other."""

    location: Location
    config: DataConfig
    progress: Progress | None
    digests: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Path]:
        names = self.location.names
        for done, name in enumerate(names):
            if self.progress is not None:
                self.progress(name, done, len(names))
            with self._local(name) as file:
                self.digests.append(file_sha256(file))
                self.sizes.append(file.stat().st_size)
                yield file
        if self.progress is not None:
            self.progress("", len(names), len(names))

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        if self.location.is_local:
            file = Path(self.location.of(name))
            if not file.is_file():
                raise DataError(f"there is no shard {redacted(str(file))}.")
            yield file
            return
        folder = Path(self.config.cache_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".index-", dir=folder) as scratch:
            file = Path(scratch) / name.rpartition("/")[2]
            try:
                fetch(self.location.of(name), file, self.config)
            except DiskFull as error:
                raise DataError(f"the disk of {folder} is full. Name another by --data.cache-dir.") from error
            yield file


def _index_of_tars(walk: _Walk) -> ShardIndex:
    files = (file for each in walk for file in tar_files(str(each)))
    found = TarIndex(files, walk.config.max_bytes)
    labels, class_names = found.labels()
    return ShardIndex(
        kind="tar",
        column=None,
        shards=tuple(map(Shard, walk.location.names, walk.sizes, walk.digests, walk.sizes)),
        class_names=class_names,
        skipped=tuple(found.skipped),
        starts=np.searchsorted(np.array(found.shards, np.int64), np.arange(len(walk.sizes) + 1)).astype(np.int64),
        offsets=np.array(found.offsets, np.int64),
        sizes=np.array(found.sizes, np.int64),
        name_ends=np.array(found.ends, np.int64),
        names=np.frombuffer(bytes(found.names), np.uint8),
        labels=labels,
    )


@dataclass
class _Rows:
    """What was found in Parquet files."""

    sizes: list[np.ndarray] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    present: list[np.ndarray] = field(default_factory=list)
    label_tables: list[Any] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    stored: list[int] = field(default_factory=list)

    def add(self, file: Path, name: str, config: DataConfig) -> None:
        """Looks at a file, one row group at a time."""
        row, stored, num_images = 0, 0, self.starts[-1]
        for table, column in row_groups(file, config):
            present = has_bytes(column)
            sizes = np.asarray(arrow().compute.binary_length(column).fill_null(0).to_numpy(), np.int64)[present]
            self.sizes.append(sizes)
            self.offsets.append(stored + np.cumsum(sizes) - sizes)
            self.rows.append(row + np.flatnonzero(present))
            self.present.append(present)
            self.label_tables.append(table.select([one for one in table.column_names if one == config.label_column]))
            self.skipped += [
                SkippedImage(f"{name}:{row + place}", "has no image bytes")
                for place in np.flatnonzero(~present).tolist()
            ]
            row, stored, num_images = row + len(present), stored + int(sizes.sum()), num_images + len(sizes)
        self.starts.append(num_images)
        self.stored.append(stored)


def _index_of_parquet(walk: _Walk) -> ShardIndex:
    found, class_names = _Rows(), None
    for number, (file, name) in enumerate(zip(walk, walk.location.names, strict=True)):
        found.add(file, name, walk.config)
        if number == 0:
            class_names = class_names_of(arrow().parquet.read_schema(file), walk.config.label_column)
    labels = labels_of([table for table in found.label_tables if table.num_rows], walk.config.label_column)
    if labels is not None:
        labels = labels[_joined(found.present, np.bool_)]
        check_class_names(walk.location.base, labels, class_names)
    names = [str(row).encode() for row in _joined(found.rows, np.int64).tolist()]
    return ShardIndex(
        kind="parquet",
        column=walk.config.image_column,
        shards=tuple(map(Shard, walk.location.names, walk.sizes, walk.digests, found.stored)),
        class_names=class_names if labels is not None else None,
        skipped=tuple(found.skipped),
        starts=np.array(found.starts, np.int64),
        offsets=_joined(found.offsets, np.int64),
        sizes=_joined(found.sizes, np.int64),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        labels=labels,
    )


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)
