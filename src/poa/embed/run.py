"""Computes vectors in parts that outlive the process, shared between processes, and puts them together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poa.config.checks import require, require_probability
from poa.data import ImageSource, SkippedImage
from poa.data.sources import check_bad_share
from poa.embed.parts import SCRATCH_PREFIX, Columns, description, num_rows, opened_writer, read_part
from poa.embed.stream import Computing, VectorBatch, stream_vectors
from poa.errors import CheckpointError, ConfigError
from poa.files import check_writable, json_value, write_text
from poa.models import Candidate
from poa.version import __version__

_MAY_DIFFER = ("model", "images")
"""What a description has only for readers: the same model or images may be named in other ways."""


@dataclass(frozen=True)
class EmbedOptions:
    """What changes the vectors, if only by rounding; the same in all calls for one file."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors in the file."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; bfloat16 is faster on GPUs."""
    batch_size: int = 64
    """Images per forward pass."""
    part_size: int = 1024
    """Images whose vectors are written at a time: as much work is lost at most when a process is killed."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.part_size >= 1, "part_size", self.part_size, "1 or more")


@dataclass(frozen=True)
class Share:
    """Which parts a process computes: every `num_processes`-th, from `process` on."""

    process: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        require(self.num_processes >= 1, "WORLD_SIZE", self.num_processes, "1 or more")
        require(0 <= self.process < self.num_processes, "RANK", self.process, f"0 to {self.num_processes - 1}")

    @classmethod
    def of_environment(cls) -> Share:
        """As torchrun, or a job array, says by RANK and WORLD_SIZE; all parts without them.

        Raises:
            ConfigError: they are no numbers or do not fit together.
        """
        try:
            return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError as error:
            raise ConfigError(f"RANK and WORLD_SIZE must be whole numbers: {error}.") from error


@dataclass(frozen=True)
class Embedded:
    """What there is after a call.

    Attributes:
        num_images: rows of the table; 0 while it is not complete.
        skipped: the images without a vector, with reasons; empty while the table is not complete.
        missing: parts that other processes still have to write, by number.
        was_there: the same table was complete already; nothing was computed.
    """

    num_images: int
    skipped: tuple[SkippedImage, ...]
    missing: tuple[int, ...] = ()
    was_there: bool = False


def embed(
    network: Candidate,
    source: ImageSource,
    out: Path,
    options: EmbedOptions = EmbedOptions(),
    *,
    share: Share = Share(),
    num_workers: int = 0,
    max_bad_share: float = 0.01,
    on_progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Writes the class vectors of all images, in the order of the source; images that cannot be read are left out.

    The images are cut into parts of consecutive ones. A part is written when it is complete, so a call that was killed
    is gone on with by the next, and the result is the same to the last bit. Several processes may share the parts;
    they do not talk to one another, and the one that finds all of them there puts the table together.

    Args:
        network: on the device where it is to compute.
        source: the images.
        out: a file `*.parquet` (until it is complete, the parts are in `*.parquet.parts` beside it), or a directory
            that keeps the parts.
        options: what changes the vectors.
        share: the parts of this process.
        num_workers: processes that decode; they change nothing of the result.
        max_bad_share: refuse when more than this share of the images cannot be read.
        on_progress: called with the images done and those of this process's share.

    Raises:
        CheckpointError: `out` holds other vectors, or cannot be written.
        DataError: too many images cannot be read, or vectors are not finite.
    """
    require_probability("max_bad_share", max_bad_share)
    table = _Table(network, source, out, options, max_bad_share)
    with _writing(out):
        if (found := table.complete()) is not None:
            return found
        table.begin()
    how = Computing(options.batch_size, num_workers, options.precision == "bfloat16")
    table.compute(share, how, on_progress)
    with _writing(out):
        return table.end()


class _Table:
    """A table of vectors on its way."""

    def __init__(
        self, network: Candidate, source: ImageSource, out: Path, options: EmbedOptions, max_bad_share: float
    ) -> None:
        self.network, self.source, self.out, self.max_bad_share = network, source, out, max_bad_share
        self.columns = Columns(network.num_features, options.dtype, source.labels is not None)
        self.described = _described(network, source, options)
        self.is_file = out.suffix.lower() == ".parquet"
        self.folder = out.with_name(f"{out.name}.parts") if self.is_file else out
        self.skipped_file = out.with_suffix(".skipped.jsonl") if self.is_file else out / "_skipped.jsonl"
        size, length = options.part_size, len(source)
        self.spans = [range(start, min(start + size, length)) for start in range(0, length, size)]
        self.paths = [self.folder / f"part-{number:05d}.parquet" for number in range(len(self.spans))]

    def complete(self) -> Embedded | None:
        """What there is, if the file is complete; remains of its making are cleared away."""
        if not self.is_file or not self.out.exists():
            return None
        self._require_same(self.out)
        skipped = _read_skipped(self.skipped_file)
        self._check_share(skipped)
        shutil.rmtree(self.folder, ignore_errors=True)
        return Embedded(num_rows(self.out), skipped, was_there=True)

    def begin(self) -> None:
        """Makes the directory of parts, or looks whether those that are there are of the same table."""
        if self.is_file:
            check_writable(self.out)
        elif self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"{self.out} is a file. Name a file that ends in .parquet, or a directory.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith("part-") and path.suffix == ".parquet":
                self._require_same(path)
            elif not path.name.startswith(".") and path != self.skipped_file:
                raise CheckpointError(f"{self.folder} holds other files, {path.name} for example. Name another place.")

    def compute(self, share: Share, how: Computing, on_progress: Callable[[int, int], None] | None) -> None:
        """Writes the parts of a process that are not there."""
        own = range(share.process, len(self.spans), share.num_processes)
        due = [number for number in own if not self.paths[number].exists()]
        total = sum(len(self.spans[number]) for number in own)
        done = total - sum(len(self.spans[number]) for number in due)
        bad, batches = list(self.source.skipped), list[VectorBatch]()
        for batch in stream_vectors(self.network, self.source, [self.spans[number] for number in due], how):
            batches.append(batch)
            if batch.is_last:
                with _writing(self.out):
                    bad += self._write(self.paths[due[batch.span]], batches)
                self._check_share(bad)
                batches = []
            done += len(batch.indices) + len(batch.skipped)
            if on_progress is not None:
                on_progress(done, total)

    def end(self) -> Embedded:
        """Puts the table together if all parts are there."""
        missing = tuple(number for number, path in enumerate(self.paths) if not path.exists())
        if missing:
            return self.complete() or Embedded(0, (), missing)
        try:
            skipped = list(self.source.skipped)
            for path in self.paths:
                skipped += [SkippedImage(*each) for each in description(path)["skipped"]]
            self._check_share(skipped)
            self._write_skipped(skipped)
            if self.is_file:
                self._assemble(len(skipped))
            for path in self.folder.glob(f"{SCRATCH_PREFIX}*"):
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            # Another process found all parts too, was faster and has removed them.
            if (found := self.complete()) is None:
                raise
            return found
        return Embedded(len(self.source) - len(skipped) + len(self.source.skipped), tuple(skipped))

    def _write(self, path: Path, batches: Sequence[VectorBatch]) -> list[SkippedImage]:
        """Writes one part; gives back the images that could not be read."""
        indices = [index for batch in batches for index in batch.indices]
        vectors = np.concatenate([batch.vectors for batch in batches])
        skipped = [each for batch in batches for each in batch.skipped]
        rows = self.columns.table(self.source, indices, vectors)
        described = {**self.described, "skipped": skipped}
        with opened_writer(path, self.columns.schema(described), self.folder) as writer:
            writer.write_table(rows)
        return skipped

    def _assemble(self, num_skipped: int) -> None:
        schema = self.columns.schema({**self.described, "num_skipped": num_skipped})
        with opened_writer(self.out, schema, self.folder) as writer:
            for path in self.paths:
                rows = read_part(path)
                if rows.num_rows:
                    writer.write_table(rows)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_skipped(self, skipped: Sequence[SkippedImage]) -> None:
        if skipped:
            write_text(self.skipped_file, "".join(f"{json.dumps(each._asdict())}\n" for each in skipped))
        else:
            self.skipped_file.unlink(missing_ok=True)

    def _check_share(self, skipped: Sequence[SkippedImage]) -> None:
        total = len(self.source) + len(self.source.skipped)
        check_bad_share(skipped, total, self.max_bad_share, option="--max-bad-share")

    def _require_same(self, path: Path) -> None:
        found = description(path)
        differing = [name for name, value in self.described.items() if found.get(name) != value]
        differing = [name for name in differing if name not in _MAY_DIFFER]
        if not differing:
            return
        if not found:
            raise CheckpointError(f"{path} is there already and is not from `poa embed`. Name another file.")
        name, place = differing[0], path if path == self.out else self.folder
        raise CheckpointError(
            f"{path} holds vectors of another kind: its {name} is {_short(found.get(name))}, now it would be "
            f"{_short(self.described[name])}. Name another place, or remove {place}."
        )


def _described(network: Candidate, source: ImageSource, options: EmbedOptions) -> dict[str, Any]:
    """What tells tables of vectors apart, and what their readers want to know, as JSON has it."""
    classes = None if source.class_names is None else list(source.class_names)
    found = {
        "poa_version": __version__,
        "model": network.source,
        "network": network.name,
        "fingerprint": network.fingerprint,
        "preprocessing": asdict(network.preprocessing),
        "images": source.spec,
        "images_fingerprint": source.fingerprint,
        "class_names": classes,
        "options": asdict(options),
        "device": network.device.type,
    }
    return dict(json.loads(json.dumps(found)))


def _read_skipped(path: Path) -> tuple[SkippedImage, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(SkippedImage(**json_value(line)) for line in path.read_bytes().splitlines())
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Remove it and run the same command again.") from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}.") from error
