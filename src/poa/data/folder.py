"""Images in a folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image

from poa.config import DataConfig
from poa.data.base import ImageSource, SkippedImage, checked_index, printable
from poa.data.decode import BadImage, decode_image, mode_of_channels

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""File names with these endings, in upper or lower case, count as images."""


def is_image_name(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return "." in name and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


class FolderSource(ImageSource):
    """All images below a folder, sorted by their path relative to it.

    Links are followed, each directory is walked once. Labels are the first-level folders, when every image
    lies in one and there are two or more.
    """

    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None:
        mode_of_channels(num_channels)
        self.spec = spec
        self.root = Path(spec).expanduser()
        self.num_channels = num_channels
        self.max_pixels, self.max_bytes = config.max_pixels, config.max_bytes
        listing = _walk(self.root)
        listing.files.sort()
        self.num_files_seen = listing.num_files_seen
        self.skipped = tuple(sorted(listing.skipped))
        self._names = [name for name, _ in listing.files]
        self._sizes = np.array([size for _, size in listing.files], dtype=np.int64)
        self.labels, self.class_names = _labels(self._names)

    @classmethod
    def accepts(cls, spec: str) -> bool:
        """Whether it is a folder."""
        return Path(spec).expanduser().is_dir()

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Image.Image:
        """See `ImageSource.load`."""
        name = self._names[checked_index(index, len(self))]
        return decode_image(self.root / name, self.num_channels, self.max_pixels, self.max_bytes)

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`."""
        place = checked_index(index, len(self))
        if self._sizes[place] > self.max_bytes:
            raise BadImage(f"has {self._sizes[place]} bytes, more than {self.max_bytes} (data.max_bytes)")
        try:
            return (self.root / self._names[place]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error

    def image_name(self, index: int) -> str:
        """The path relative to the folder, with escapes where it does not print."""
        return printable(self._names[checked_index(index, len(self))])

    @cached_property
    def fingerprint(self) -> str:
        """Over the relative paths and the sizes of all files."""
        digest = hashlib.sha256()
        for name, size in zip(self._names, self._sizes.tolist(), strict=True):
            digest.update(f"{printable(name)}\n{size}\n".encode())
        return digest.hexdigest()


@dataclass
class _Listing:
    files: list[tuple[str, int]] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    num_files_seen: int = 0

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(SkippedImage(printable(name), reason))


def _walk(root: Path) -> _Listing:
    """Every file below `root`; real directories first, so that a link never takes their place."""
    listing = _Listing()
    directories, links = deque([""]), deque[str]()
    visited: set[tuple[int, int]] = set()
    while directories or links:
        folder = directories.popleft() if directories else links.popleft()
        try:
            status = os.stat(root / folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            listing.skip(f"{folder}/", f"the folder cannot be read: {error.strerror}")
            continue
        for entry in entries:
            _visit(entry, f"{folder}/{entry.name}" if folder else entry.name, listing, (directories, links))
    return listing


def _visit(entry: os.DirEntry[str], name: str, listing: _Listing, queues: tuple[deque[str], deque[str]]) -> None:
    directories, links = queues
    is_image = is_image_name(entry.name)
    try:
        status = entry.stat()
    except OSError as error:
        listing.num_files_seen += 1
        if is_image:
            what = "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
            listing.skip(name, f"{what}: {error.strerror}")
        return
    if stat.S_ISDIR(status.st_mode):
        (links if entry.is_symlink() else directories).append(name)
        if is_image:
            listing.skip(name, "is a folder")
        return
    listing.num_files_seen += 1
    if not is_image:
        return
    if not stat.S_ISREG(status.st_mode):
        listing.skip(name, "is not a regular file")
    elif status.st_size == 0:
        listing.skip(name, "is empty (zero bytes)")
    else:
        listing.files.append((name, status.st_size))


def _labels(names: list[str]) -> tuple[Int64[np.ndarray, " images"] | None, tuple[str, ...] | None]:
    folders = [name.partition("/")[0] for name in names if "/" in name]
    classes = sorted(set(folders))
    if len(folders) < len(names) or len(classes) < 2:
        return None, None
    number = {folder: label for label, folder in enumerate(classes)}
    labels = np.array([number[folder] for folder in folders], dtype=np.int64)
    return labels, tuple(printable(folder) for folder in classes)
