"""Images in shards: local ones where they are, remote ones through the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from poa.config import DataConfig
from poa.data.base import ImageSource, checked_index, printable
from poa.data.decode import BadImage, decode_image, mode_of_channels
from poa.data.shards.cache import CachedShard, ShardCache
from poa.data.shards.fetch import Content
from poa.data.shards.index import Shard, ShardIndex, open_index
from poa.data.shards.location import INDEX_NAME, Location, folder_of, is_pattern, is_url, kind_of, locate, redacted
from poa.errors import DataError

DEFAULT_COLUMN = DataConfig().image_column


class _OpenedIndex(NamedTuple):
    """The file of an index, and what tells that it has not been replaced."""

    path: Path
    modified: int
    size: int


class ShardSource(ImageSource):
    """The images of indexed shards: .tar or .parquet files in a folder or behind a URL.

    Where images lie is known from the index, which all processes map into memory: what a process needs besides does
    not grow with the number of images. Local archives are read in place. Remote shards, and the images of Parquet
    files, are read from the cache (`ShardCache`), into which a shard is fetched when its first image is asked for.

    Images are in the order of the names of their shards, and in a shard in its own order.

    Attributes:
        cache: where fetched shards are kept.
    """

    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None:
        mode_of_channels(num_channels)
        self.spec = spec
        self.num_channels = num_channels
        self.config = config
        self.cache = ShardCache(config)
        self._location = locate(spec)
        file = _index_file(spec, self._location, config, self.cache)
        status = file.stat()
        self._opened = _OpenedIndex(file, status.st_mtime_ns, status.st_size)
        index = open_index(file)
        _check_column(index, config)
        self._chosen = _chosen(index, self._location, file)
        self._starts = np.concatenate([[0], np.cumsum(np.diff(index.starts)[self._chosen])]).astype(np.int64)
        self._shards = tuple(index.shards[number] for number in self._chosen.tolist())
        self.block_sizes = np.diff(self._starts)
        self.skipped, self.class_names = index.skipped, index.class_names
        self._attach(index)
        self._wanted = tuple(map(self._cached, self._shards))
        self._check_shards()

    @classmethod
    def accepts(cls, spec: str) -> bool:
        """Whether it is a URL, a pattern of .parquet files, or .tar or .parquet files with an index beside them."""
        if is_url(spec):
            return True
        path, kind = Path(spec).expanduser(), kind_of(spec)
        folder = path if kind is None or path.is_dir() else Path(folder_of(spec)).expanduser()
        has_index = (path.is_dir() or kind is not None) and (folder / INDEX_NAME).is_file()
        return has_index or (kind == "parquet" and is_pattern(spec) and not path.exists())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, index: int) -> Image.Image:
        """See `ImageSource.load`.

        Raises:
            BadImage: it cannot be decoded, is too large, or its local shard cannot be read.
            DataError: its shard cannot be fetched.
        """
        return decode_image(self.encoded(index), self.num_channels, self.config.max_pixels)

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`; raises as `load`."""
        number, place = self._find(index)
        offset, size = int(self._index.offsets[place]), int(self._index.sizes[place])
        if size > self.config.max_bytes:
            raise BadImage(f"{size} bytes are more than {self.config.max_bytes} (data.max_bytes)")
        if self.is_cached:
            content = self.cache.read(self._wanted[number], offset, size)
        else:
            content = _read_local(Path(self._location.of(self._shards[number].name)), offset, size)
        if len(content) < size:
            raise BadImage("its shard is shorter than when it was indexed")
        return content

    def image_name(self, index: int) -> str:
        """The shard and the name in it: `shards-0.tar/cat/1.jpg`, or `train-0.parquet:17`."""
        return self._index.name(self._find(index)[1])

    @cached_property
    def fingerprint(self) -> str:
        """Over the index, with the SHA-256 of every shard, and which of its shards are used."""
        names = "\n".join(shard.name for shard in self._shards)
        return hashlib.sha256(f"{self._index.fingerprint}\n{names}".encode()).hexdigest()

    @property
    def is_cached(self) -> bool:
        """Whether the images are read from the cache, not from where the shards are."""
        return not self._location.is_local or self._index.kind == "parquet"

    def shards_of(self, indices: Int64[np.ndarray, " images"]) -> list[CachedShard]:
        """The shards that some images lie in, each once, in the order of their first image among `indices`."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        _, first = np.unique(numbers, return_index=True)
        return [self._wanted[number] for number in numbers[np.sort(first)].tolist()]

    def room_for(self, num_shards: int) -> int:
        """Bytes that the largest so many shards take in the cache, those included that are needed to fetch them."""
        sizes = sorted((shard.num_bytes for shard in self._wanted), reverse=True)
        return sum(sizes[:num_shards]) + self.room_to_fetch

    @cached_property
    def room_to_fetch(self) -> int:
        """Bytes needed besides the shards while some are fetched: for the Parquet files that images are taken from."""
        return self.config.downloads * max((shard.space - shard.num_bytes for shard in self._wanted), default=0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_index", "labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        path, *known = self._opened
        index, status = open_index(path, is_verified=True), path.stat()
        if [status.st_mtime_ns, status.st_size] != known:
            raise DataError(f"the index {printable(str(path))} was replaced while it was in use. Start again.")
        self._attach(index)

    def _attach(self, index: ShardIndex) -> None:
        """Takes the arrays, which stay in the file."""
        self._index = index
        self.labels = index.labels
        if index.labels is not None and len(self._shards) < len(index.shards):
            ends = index.starts[1:]
            parts = [index.labels[index.starts[number] : ends[number]] for number in self._chosen.tolist()]
            self.labels = np.concatenate(parts)

    def _find(self, index: int) -> tuple[int, int]:
        """The shard that an image lies in, and the image's place in the index."""
        wanted = checked_index(index, len(self))
        number = int(np.searchsorted(self._starts, wanted, side="right")) - 1
        return number, int(self._index.starts[self._chosen[number]]) + wanted - int(self._starts[number])

    def _cached(self, shard: Shard) -> CachedShard:
        column, key = self._index.column, f"{shard.sha256}.tar"
        if column is not None:
            key = f"{hashlib.sha256(f'{shard.sha256}/{column}'.encode()).hexdigest()}.images"
        content = Content(shard.num_bytes, shard.sha256)
        return CachedShard(key, self._location.of(shard.name), content, shard.num_stored, column)

    def _check_shards(self) -> None:
        """Raises `DataError` where local shards are not those in the index, or one does not fit the cache."""
        if self.is_cached:
            self.cache.prepare()
            largest = max((shard.space for shard in self._wanted), default=0)
            self.cache.check_room(largest, "the largest shard and what is needed to read it")
        for shard in self._shards if self._location.is_local else ():
            file = Path(self._location.of(shard.name))
            try:
                num_bytes = file.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{printable(str(file))}, which the index names, cannot be read: {error.strerror}."
                ) from error
            if num_bytes != shard.num_bytes:
                raise DataError(
                    f"{printable(str(file))} has {num_bytes} bytes, and {shard.num_bytes} according to the index. "
                    f"Copy it again, or make the index anew: poa data index {self.spec}"
                )


def _index_file(spec: str, location: Location, config: DataConfig, cache: ShardCache) -> Path:
    """The local file of the index; a remote one is fetched."""
    where = config.index or location.of(INDEX_NAME)
    named = locate(where)
    if named.is_local:
        file = Path(named.base)
        if not file.is_file():
            raise _no_index(spec, where)
        return file
    try:
        return cache.fetched_anew(where)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise _no_index(spec, where) from error
        raise


def _no_index(spec: str, where: str) -> DataError:
    return DataError(
        f"there is no index of the shards {redacted(spec)!r}: {redacted(where)} is not there. Make it once and put it "
        f"there, or name it by --data.index: poa data index '{redacted(spec)}' --out {INDEX_NAME}"
    )


def _check_column(index: ShardIndex, config: DataConfig) -> None:
    if index.column is not None and config.image_column not in (DEFAULT_COLUMN, index.column):
        raise DataError(
            f"the index is of the column {index.column!r}, and data.image_column is {config.image_column!r}. Leave it "
            f"out, or make an index of that column: poa data index --image-column {config.image_column}"
        )


def _chosen(index: ShardIndex, location: Location, file: Path) -> Int64[np.ndarray, " shards"]:
    """The numbers in the index of the shards that a spec names."""
    number = {shard.name: place for place, shard in enumerate(index.shards)}
    names: Sequence[str] = sorted(set(location.names)) or list(number)
    missing = [name for name in names if name not in number]
    if not location.names and location.is_local:
        if not Path(location.base).is_dir():
            raise DataError(f"{printable(location.base)!r} is no folder of shards, nor a .tar or .parquet file.")
        there = {entry.name for entry in Path(location.base).iterdir()}
        missing = sorted(name for name in there - set(number) if kind_of(name) == index.kind)
    if missing:
        raise DataError(
            f"the index {printable(str(file))} does not have {len(missing)} of the shards, {missing[0]} for example. "
            f"Make it anew: poa data index"
        )
    return np.array([number[name] for name in names], dtype=np.int64)


def _read_local(file: Path, offset: int, size: int) -> bytes:
    try:
        with file.open("rb", buffering=0) as opened:
            return os.pread(opened.fileno(), size, offset)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
