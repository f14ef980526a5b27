"""Images in tar archives: one, a folder of them, or a numbered pattern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from poa.config import DataConfig
from poa.data.base import ImageSource, checked_index
from poa.data.decode import BadImage, decode_image, mode_of_channels
from poa.data.folder import is_image_name
from poa.data.tar_index import TarIndex, is_pattern, is_tar_name, shown_name, tar_files


class TarSource(ImageSource):
    """The images of one .tar file, of all in a folder, or of a pattern like `shards-{0000..0009}.tar`.

    Archives in order of name, images in the order of the archive. One pass over the headers finds where every image
    lies; it is then read from there, in any order, and nothing is unpacked. Labels are the `.cls` members with the
    key of the image (`0001.cls` beside `0001.jpg`, as in webdataset) where every image has one, else the first-level
    folders as in a folder of images.

    Members whose names lead out of the archive, links, devices, files with holes, empty ones and those of
    more than `data.max_bytes` are skipped and reported.
    """

    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None:
        mode_of_channels(num_channels)
        self.spec = spec
        self.num_channels = num_channels
        self.max_pixels, self.max_bytes = config.max_pixels, config.max_bytes
        self._files = tar_files(spec)
        index = TarIndex(self._files, config.max_bytes)
        self.num_files_seen = index.num_files_seen
        self.skipped = tuple(index.skipped)
        self.labels, self.class_names = index.labels()
        self._names = bytes(index.names)
        self._ends, self._shards = np.array(index.ends, np.int64), np.array(index.shards, np.int32)
        self._offsets, self._sizes = np.array(index.offsets, np.int64), np.array(index.sizes, np.int64)
        self._fingerprint = index.fingerprint()

    @classmethod
    def accepts(cls, spec: str) -> bool:
        """Whether it is a tar archive, a folder with archives and no images nor folders, or a pattern."""
        path = Path(spec).expanduser()
        if path.is_dir():
            entries = list(path.iterdir())
            others = any(is_image_name(entry.name) or entry.is_dir() for entry in entries)
            return not others and any(is_tar_name(entry.name) for entry in entries)
        return is_tar_name(path.name) if path.is_file() else is_pattern(spec)

    def __len__(self) -> int:
        return len(self._offsets)

    def load(self, index: int) -> Image.Image:
        """See `ImageSource.load`."""
        return decode_image(self.encoded(index), self.num_channels, self.max_pixels, self.max_bytes)

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`."""
        place = checked_index(index, len(self))
        size = int(self._sizes[place])
        try:
            with self._files[self._shards[place]].open("rb") as file:
                file.seek(int(self._offsets[place]))
                content: bytes = file.read(size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if len(content) < size:
            raise BadImage("the archive is shorter than when it was listed")
        return content

    def image_name(self, index: int) -> str:
        """The archive and the name in it, for example `shard-0.tar/cat/1.jpg`."""
        place = checked_index(index, len(self))
        start = int(self._ends[place - 1]) if place else 0
        name = self._names[start : int(self._ends[place])].decode("utf-8", "surrogateescape")
        return shown_name(self._files[self._shards[place]], name)

    @property
    def fingerprint(self) -> str:
        """Over the archives' names, the names, sizes and times (as archived) of all images, and their labels.

        An archive whose images are replaced by others of the same sizes, with the times kept, is not told apart.
        """
        return self._fingerprint
