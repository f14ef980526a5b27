"""Converts any source of images into shards, each a fair sample of the whole."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from poa.config import DataConfig
from poa.config.checks import require_non_negative, require_positive
from poa.data.base import ImageSource, SkippedImage
from poa.data.decode import BadImage
from poa.data.parquet import ParquetInOrder
from poa.data.shards import INDEX_NAME, ShardIndex, ShardSource, build_index
from poa.data.sources import check_bad_share
from poa.data.tools.copied import FlatCopy
from poa.data.tools.look import Encoded, ReadWhole
from poa.data.tools.writers import WRITERS, Sample
from poa.data.workers import map_images
from poa.errors import CheckpointError, DataError, PoaWarning
from poa.files import read_json, replace_file, write_json, write_text
from poa.randomness import generator

JOB_NAME = "poa-shards.json"
"""What the shards are made of and how; `is_complete` once all of them are there."""

ORIGINS_NAME = "origins.jsonl"
"""For each image's name in the shards its name in the source."""

SKIPPED_NAME = "skipped.jsonl"
"""The images that were left out, with reasons."""

_PARTS_NAME = ".parts"
_CHUNK_SIZE = 16
_NUM_SAMPLED = 1000
_MEGABYTE = 1_000_000

OnProgress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and all of them."""


@dataclass(frozen=True)
class ShardOptions:
    """What changes the shards."""

    format: Literal["tar", "parquet"] = "tar"
    """tar: as webdataset reads it (KEY.jpg, KEY.cls). parquet: as Hugging Face's data sets are."""
    shard_mb: int = 256
    """Megabytes (10⁶ bytes) of a shard, about: all have equally many images, one more or less."""
    shuffle: bool = True
    """Shuffle the images, so that every shard is a fair sample of all."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        require_positive("shard_mb", self.shard_mb)
        require_non_negative("seed", self.seed)


@dataclass(frozen=True)
class Written:
    """The shards that there are.

    Attributes:
        files: in order.
        num_images: all images in them.
        skipped: images that were left out.
        was_there: they were complete already.
    """

    files: tuple[Path, ...]
    num_images: int
    skipped: tuple[SkippedImage, ...]
    was_there: bool

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(file.stat().st_size for file in self.files)


def write_shards(
    source: ImageSource,
    out: Path,
    options: ShardOptions = ShardOptions(),
    *,
    config: DataConfig,
    num_workers: int = 0,
    on_progress: OnProgress | None = None,
) -> Written:
    """Writes the images as shards: their files' bytes unchanged, their labels, in an order drawn once.

    The same source and options give the same bytes, for any number of workers. A shard is there whole or not at all,
    so a conversion that was interrupted is gone on with by the next call. Images that do not decode are left out.

    Args:
        source: the images. Those of sources that are best read in order are first copied into one file in `out`.
        out: the folder for the shards and the files beside them (`JOB_NAME`, `ORIGINS_NAME`, `SKIPPED_NAME`).
        options: what changes the shards.
        config: its limits on pixels and bytes of an image, and `max_bad_share`, how many may be left out.
        num_workers: processes that read and decode; 0 does it in this one. Each has up to 48 images in memory.
        on_progress: see `OnProgress`.

    Raises:
        CheckpointError: `out` holds something else, or shards of other images or with other options; it cannot be
            written, or there is not enough room.
        DataError: too many images do not decode.
    """
    with _writing(out):
        job = _Job(source, out, options, config)
        was_there = job.is_complete
        if not was_there:
            tell = on_progress or _silent
            with job.begun():
                job.write(job.readable(tell), num_workers, tell)
                job.end(tell)
        return job.found(was_there)


class _Job:
    """A conversion on its way."""

    def __init__(self, source: ImageSource, out: Path, options: ShardOptions, config: DataConfig) -> None:
        self.source, self.out, self.options, self.config = source, out, options, config
        self.writer = WRITERS[options.format]
        self.parts = out / _PARTS_NAME
        self.skipped = list(source.skipped)
        self.described = _described(source, options, config)
        found = _read_job(out, self.described)
        self.num_shards, self.is_complete = int(found.get("num_shards", 0)), bool(found.get("is_complete"))
        if self.is_complete:
            self._look_at_complete()

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.out / f"shard-{number:05d}{self.writer.suffix}"

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Within, the folder is this process's; what one that was killed left half written is cleared away first."""
        self.parts.mkdir(parents=True, exist_ok=True)
        with (self.parts / "lock").open("wb") as lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"another process is writing to {self.out}. Let it end, or stop it.") from error
            except (ImportError, OSError) as error:
                text = f"{self.out} cannot be locked ({error}): see to it that no second conversion begins there."
                warnings.warn(text, PoaWarning, stacklevel=2)
            write_json(self.out / JOB_NAME, self.described)
            for scratch in self.out.glob(".shard-*"):
                scratch.unlink()
            yield

    def readable(self, tell: OnProgress) -> Encoded:
        """The images, to be read in any order."""
        is_cached = isinstance(self.source, ShardSource) and self.source.is_cached
        if not (is_cached or isinstance(self.source, ParquetInOrder)):
            return self.source
        return FlatCopy(self.source, self.parts, lambda done, total: tell("copied", done, total))

    def write(self, images: Encoded, num_workers: int, tell: OnProgress) -> None:
        """Writes the shards that are not there."""
        length, mean = len(self.source), self._mean_bytes(images)
        self.num_shards = min(length, max(1, math.ceil(length * mean / (self.options.shard_mb * _MEGABYTE))))
        spans = np.array_split(self._order(), self.num_shards)
        ends = np.cumsum([len(span) for span in spans])
        due = [number for number in range(self.num_shards) if not self.path(number).exists()]
        for number in sorted(set(range(self.num_shards)) - set(due)):
            self.skipped += _read_skipped(self._record(number, "skipped"))
        indices = np.concatenate([np.empty(0, np.int64), *(spans[number] for number in due)])
        self._check_room(len(indices) * mean)
        looked = map_images(ReadWhole(images, self.config), indices, num_workers, _CHUNK_SIZE)
        with closing(_told(looked, length - len(indices), length, tell)) as contents:
            for number in due:
                self._check_share()
                self._write_shard(number, int(ends[number]) - len(spans[number]), spans[number], contents)
        self._check_share()

    def end(self, tell: OnProgress) -> None:
        """Writes the index and the other files beside the shards, and clears the rest away."""
        if len(self.skipped) == len(self.source) + len(self.source.skipped):
            raise DataError(f"no image of {self.source.spec!r} can be read: nothing is left to write.")
        with replace_file(self.out / ORIGINS_NAME) as file:
            for number in range(self.num_shards):
                file.write(self._record(number, "origins").read_bytes())
        self._write_skipped()
        own = replace(self.config, image_column=DataConfig.image_column, label_column=DataConfig.label_column)
        index = build_index(str(self.out), own, lambda *at: tell("indexed", *at[1:]))
        replace(index, class_names=self.source.class_names).save(self.out / INDEX_NAME)
        write_json(self.out / JOB_NAME, {**self.described, "num_shards": self.num_shards, "is_complete": True})
        shutil.rmtree(self.parts)

    def found(self, was_there: bool) -> Written:
        """What there is at the end."""
        files = tuple(self.path(number) for number in range(self.num_shards))
        num_images = len(self.source) + len(self.source.skipped) - len(self.skipped)
        return Written(files, num_images, tuple(self.skipped), was_there)

    def _look_at_complete(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)
        self.skipped = _read_skipped(self.out / SKIPPED_NAME)
        self._check_share()
        for number in range(self.num_shards):
            if not self.path(number).exists():
                raise CheckpointError(
                    f"{self.path(number)} is gone. Bring it back, or remove {self.out} to begin anew."
                )

    def _order(self) -> Int64[np.ndarray, " images"]:
        length = len(self.source)
        if not self.options.shuffle:
            return np.arange(length)
        return generator(self.options.seed, "order of shards").permutation(length)

    def _mean_bytes(self, images: Encoded) -> float:
        """Of an image in a shard, from a sample spread evenly over the source."""
        length = len(self.source)
        sizes = []
        for index in np.linspace(0, length - 1, min(length, _NUM_SAMPLED)).astype(int).tolist():
            try:
                sizes.append(self.writer.num_bytes(len(images.encoded(index)), self.source.labels is not None))
            except BadImage:
                continue
        return sum(sizes) / max(1, len(sizes))

    def _check_room(self, num_bytes: float) -> None:
        free = shutil.disk_usage(self.out).free
        if num_bytes > free:
            raise CheckpointError(
                f"the shards that are still to be written need about {num_bytes / 1e9:.1f} GB; the disk of {self.out} "
                f"has {free / 1e9:.1f} GB left. Make room, or name a folder on another disk."
            )

    def _write_shard(
        self, number: int, first: int, indices: Int64[np.ndarray, " N"], contents: Iterator[tuple[bytes, str] | str]
    ) -> None:
        """Writes a shard and the records of it; the key of its first image is `first`."""
        labels, width = self.source.labels, max(6, len(str(len(self.source) - 1)))
        origins, skipped = list[dict[str, str]](), list[SkippedImage]()
        with replace_file(self.path(number)) as file:
            with closing(self.writer(file, self.source.class_names, labels is not None)) as shard:
                for place, index in enumerate(indices.tolist()):
                    origin, content = self.source.image_name(index), next(contents)
                    if isinstance(content, str):
                        skipped.append(SkippedImage(origin, content))
                    else:
                        label = None if labels is None else int(labels[index])
                        sample = Sample(f"{first + place:0{width}d}", content[1], content[0], label, origin)
                        name = f"{self.path(number).name}{shard.separator}{shard.add(sample)}"
                        origins.append({"image": name, "origin": origin})
            # On disk before the shard is: a shard that is there is done.
            _write_lines(self._record(number, "origins"), origins)
            _write_lines(self._record(number, "skipped"), [bad._asdict() for bad in skipped])
        self.skipped += skipped

    def _record(self, number: int, what: str) -> Path:
        return self.parts / f"shard-{number:05d}.{what}.jsonl"

    def _write_skipped(self) -> None:
        _write_lines(self.out / SKIPPED_NAME, [bad._asdict() for bad in self.skipped])

    def _check_share(self) -> None:
        total, listed = len(self.source) + len(self.source.skipped), self.out / SKIPPED_NAME
        if len(self.skipped) > self.config.max_bad_share * total:
            self._write_skipped()
        where = f"Those found so far are listed in {listed}.\n"
        check_bad_share(self.skipped, total, self.config.max_bad_share, where, option="--max-bad-share")


def with_class_names(index: ShardIndex, folder: Path) -> ShardIndex:
    """The index with the names of the classes that `write_shards` left beside the shards, if it has none itself."""
    path = folder / JOB_NAME
    if index.class_names is not None or index.labels is None or not path.exists():
        return index
    names = tuple(map(str, read_json(path).get("class_names") or ()))
    return replace(index, class_names=names) if int(index.labels.max()) < len(names) else index


_OPTIONS = ("max_pixels", "max_bytes", *ShardOptions.__dataclass_fields__)


def _silent(what: str, done: int, total: int) -> None:
    """Tells nothing."""


def _told(
    contents: Iterator[tuple[bytes, str] | str], done: int, total: int, tell: OnProgress
) -> Generator[tuple[bytes, str] | str]:
    """The same, with a word now and then of how far it is; `done` were done before."""
    for number, content in enumerate(contents, done + 1):
        if number % _CHUNK_SIZE == 0 or number == total:
            tell("images", number, total)
        yield content


def _described(source: ImageSource, options: ShardOptions, config: DataConfig) -> dict[str, Any]:
    """What tells conversions apart, as JSON has it."""
    return {
        "source": source.fingerprint,
        "num_images": len(source) + len(source.skipped),
        "class_names": None if source.class_names is None else list(source.class_names),
        "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes,
        **asdict(options),
    }


def _read_job(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What the conversion in the folder says of itself; empty where there is none yet.

    Raises:
        CheckpointError: the folder holds something else, or another conversion.
    """
    path = out / JOB_NAME
    if not path.exists():
        # A process that was killed at once may have left hidden files.
        if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
            raise CheckpointError(f"{out} is there already and is not from `poa data shard`. Name another folder.")
        return {}
    found = read_json(path, remedy=f"Remove {out} and begin anew.")
    differing = [name for name, value in described.items() if found.get(name) != value]
    if differing:
        name = differing[0]
        what = (
            f"with {name} {found.get(name)}; now it would be {described[name]}"
            if name in _OPTIONS
            else "of other images"
        )
        raise CheckpointError(f"{out} holds shards {what}. Name another folder, or remove it.")
    return found


def _read_skipped(path: Path) -> list[SkippedImage]:
    return [SkippedImage(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror or error}. Shards that are complete stay; the same command goes on."
        ) from error
