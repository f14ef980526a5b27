"""Where the images of tar archives lie: read from the headers alone, nothing is unpacked."""

from __future__ import annotations

import hashlib
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from poa.config import DataConfig
from poa.data.base import SkippedImage, printable
from poa.data.folder import is_image_name
from poa.data.tar_headers import HeaderError, tar_members
from poa.errors import DataError

COMPRESSED = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
"""Endings of compressed archives, and what unpacks them."""

_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_PATTERN = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)", re.DOTALL | re.IGNORECASE)
_MAX_SHARDS = 1_000_000
_MAX_CLASS_BYTES = 256
_MAX_NAME_BYTES = 4096


def is_tar_name(name: str) -> bool:
    """Whether a file of that name is a tar archive, compressed ones included."""
    stem, _, last = name.lower().rpartition(".")
    return last in ("tar", "tgz") or (stem.endswith(".tar") and f".{last}" in COMPRESSED)


def is_pattern(spec: str) -> bool:
    """Whether it is like `shards-{0000..0009}.tar`."""
    return _PATTERN.fullmatch(spec) is not None


def tar_files(spec: str) -> tuple[Path, ...]:
    """The archives that a .tar file, a folder or a pattern names, in order of name.

    Raises:
        DataError: one is compressed, or a pattern's numbers fall or one of its files is not there.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        archives = (entry for entry in path.iterdir() if is_tar_name(entry.name) and entry.is_file())
        found = sorted(archives, key=lambda file: file.name)
    else:
        found = [path] if path.is_file() else list(_expanded(spec))
    for file in found:
        _refuse_compressed(file)
    return tuple(found)


def _expanded(spec: str) -> Iterator[Path]:
    matched = _PATTERN.fullmatch(spec)
    before, first, last, after = matched.groups() if matched else ("", "1", "0", "")
    if not 0 <= int(last) - int(first) < _MAX_SHARDS:
        raise DataError(
            f"{printable(spec)!r} counts from {first} to {last}. Give the smaller number first, and name at most "
            f"{_MAX_SHARDS:,} archives."
        )
    for number in range(int(first), int(last) + 1):
        file = Path(f"{before}{number:0{len(first)}d}{after}").expanduser()
        if not file.is_file():
            raise DataError(f"{printable(spec)!r} names {printable(str(file))}, which is not there.")
        yield file


def _refuse_compressed(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
    except OSError as error:
        raise DataError(f"{printable(str(file))} cannot be read: {error.strerror}.") from error
    ending = next((ending for magic, ending in _MAGIC.items() if begin.startswith(magic)), file.suffix.lower())
    if ending in COMPRESSED:
        raise DataError(
            f"{printable(str(file))} is compressed, so the images in it cannot be read one by one; they are compressed "
            f"themselves, so little is lost without. Unpack it once: {COMPRESSED[ending]} {printable(file.name)}"
        )


class _Member(NamedTuple):
    """An image in an archive."""

    offset: int
    size: int
    modified: float
    folder: int
    key: str


class _Numbered:
    """Numbers for words, in the order in which they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __getitem__(self, word: str) -> int:
        return self.numbers.setdefault(word, len(self.numbers))

    def classes(self, numbers: Sequence[int]) -> tuple[Int64[np.ndarray, " images"], tuple[str, ...]]:
        """The place of every word in alphabetical order, and the words in it."""
        words = sorted(self.numbers)
        place = np.empty(len(words), dtype=np.int64)
        place[[self.numbers[word] for word in words]] = np.arange(len(words))
        return place[np.asarray(numbers, dtype=np.int64)], tuple(printable(word) for word in words)


@dataclass
class _Shard:
    """What was found in one archive."""

    images: dict[str, _Member] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    skipped: list[SkippedImage] = field(default_factory=list)


class TarIndex:
    """All images of a set of archives, a few tens of bytes and its name for each.

    Args:
        files: the archives.
        max_bytes: the most that an image may have (`data.max_bytes`); larger ones are skipped and reported.

    Attributes:
        names: one after the other.
        ends: where each ends in `names`.
        shards: the archive of each.
        offsets: of its first byte in the archive.
        sizes: its bytes.
        skipped: what looks like an image and cannot be used.
        num_files_seen: members that are no folders.
    """

    def __init__(self, files: Iterable[Path], max_bytes: int = DataConfig.max_bytes) -> None:
        self._max_bytes = max_bytes
        self.names, self.ends = bytearray(), array("q")
        self.shards, self.offsets, self.sizes = array("i"), array("q"), array("q")
        self.skipped: list[SkippedImage] = []
        self.num_files_seen = 0
        self._folders, self._classes = array("q"), array("q")
        self._folder_names, self._class_names = _Numbered(), _Numbered()
        self._digest = hashlib.sha256()
        for number, file in enumerate(files):
            self._add(number, file)

    def labels(self) -> tuple[Int64[np.ndarray, " images"] | None, tuple[str, ...] | None]:
        """The class of every image and the classes' names; None where there are none.

        Numbers in `.cls` members are the labels, as they are; words are numbered in alphabetical order.
        """
        if not self.ends:
            return None, None
        if min(self._classes) >= 0:
            words = self._class_names.numbers
            if not all(re.fullmatch(r"-?\d{1,18}", word) for word in words):
                return self._class_names.classes(self._classes)
            labels = np.array([int(word) for word in words], dtype=np.int64)[np.asarray(self._classes)]
            return (labels if labels.min() >= 0 else None), None
        if min(self._folders) >= 0 and len(self._folder_names.numbers) > 1:
            return self._folder_names.classes(self._folders)
        return None, None

    def fingerprint(self) -> str:
        """Over the archives' names, the names, sizes and times (as archived) of all images, and their labels."""
        digest, (labels, _) = self._digest.copy(), self.labels()
        if labels is not None:
            digest.update(labels.tobytes())
        return digest.hexdigest()

    def _add(self, number: int, file: Path) -> None:
        shard = _Shard()
        for member, stream in _members(file):
            if not member.isdir():
                self.num_files_seen += 1
                self._look_at(member, stream, file.name, shard)
        self.skipped += shard.skipped
        for name, image in shard.images.items():
            self.names += name.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.names))
            self.shards.append(number)
            self.offsets.append(image.offset)
            self.sizes.append(image.size)
            self._folders.append(image.folder)
            self._classes.append(shard.classes.get(image.key, -1))
            self._digest.update(f"{shown_name(file, name)}\n{image.size}\n{image.modified!r}\n".encode())

    def _look_at(self, member: tarfile.TarInfo, stream: BinaryIO, shard_name: str, shard: _Shard) -> None:
        if len(member.name) > _MAX_NAME_BYTES:
            if is_image_name(member.name):
                place = f"{shard_name}/{member.name[:100]}… at byte {member.offset}"
                shard.skipped.append(SkippedImage(printable(place), f"has a name of more than {_MAX_NAME_BYTES} bytes"))
            return
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if not parts:
            return
        name = "/".join(parts)
        key = "/".join([*parts[:-1], parts[-1].partition(".")[0]])
        if member.isreg() and parts[-1].partition(".")[2].lower() == "cls":
            shard.classes[key] = self._class_names[_class_word(member, stream, f"{shard_name}/{name}")]
        if not is_image_name(parts[-1]):
            return
        reason = _unusable(member, parts, self._max_bytes)
        if reason is None and name in shard.images:
            # As when it is unpacked, the later member takes the place of the earlier one.
            place = f"{shard_name}/{name} at byte {shard.images.pop(name).offset}"
            shard.skipped.append(SkippedImage(printable(place), "the archive has it again further on"))
        if reason is None:
            folder = self._folder_names[parts[0]] if len(parts) > 1 else -1
            shard.images[name] = _Member(member.offset_data, member.size, member.mtime, folder, key)
        else:
            place = f"{shard_name}/{member.name} at byte {member.offset}"
            shard.skipped.append(SkippedImage(printable(place), reason))


def shown_name(file: Path, name: str) -> str:
    """The archive and the name in it, printable."""
    return printable(f"{file.name}/{name}")


def _unusable(member: tarfile.TarInfo, parts: Sequence[str], max_bytes: int) -> str | None:
    """Why a member that is called like an image cannot be one."""
    if member.name.startswith("/") or ".." in parts:
        return "its name leads out of the archive"
    if member.issym() or member.islnk():
        return "is a link"
    # What is written with holes is not read as it stands, whether or not the library has understood it.
    has_holes = member.issparse() or any(name.startswith("GNU.sparse") for name in member.pax_headers)
    if not member.isreg() or has_holes or member.size < 0:
        return "is not a regular file"
    if member.size > max_bytes:
        return f"has {member.size} bytes, more than {max_bytes} (data.max_bytes)"
    return None if member.size else "is empty (zero bytes)"


def _class_word(member: tarfile.TarInfo, stream: BinaryIO, name: str) -> str:
    stream.seek(member.offset_data)
    content = stream.read(min(member.size, _MAX_CLASS_BYTES + 1))
    word = content.decode("utf-8", "replace").strip()
    if not word or len(content) > _MAX_CLASS_BYTES:
        raise DataError(
            f"{printable(name)} must hold a class: a number or a name of at most {_MAX_CLASS_BYTES} bytes; it has "
            f"{member.size} bytes. Mend it, or leave the .cls members out."
        )
    return word


def _members(file: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Every member of an archive, in order, from its headers.

    Raises:
        DataError: it cannot be read, is no tar archive, or is damaged or cut short.
    """
    shown, count = printable(str(file)), 0
    try:
        with file.open("rb") as stream:
            for member in tar_members(stream):
                yield member, stream
                count += 1
    except OSError as error:
        raise DataError(f"{shown} cannot be read after {count} members: {error.strerror}.") from error
    except HeaderError as error:
        raise DataError(
            f"{shown} cannot be read as a tar archive after {count} members: {printable(str(error))}. If it is cut "
            f"short, copy it again, else pack it anew."
        ) from error
