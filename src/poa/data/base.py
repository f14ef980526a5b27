"""What every source of images offers."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from poa.config import DataConfig


class SkippedImage(NamedTuple):
    """An image that cannot be used: its printable name and the reason, each on one line."""

    name: str
    reason: str


class ImageSource(ABC):
    """A fixed sequence of images, the same order on every machine; it can be pickled.

    Every source is made by `Source(spec, config, num_channels)`; `open_source` chooses the class.

    Attributes:
        spec: what the user wrote to name the source.
        labels: the class of every image (0, 1, …), or None where the source has no labels.
        class_names: the name of every class, or None where they are not known.
        skipped: images found unusable while listing; they have no index.
        block_sizes: where images lie in blocks that are fetched whole (shards), how many each block has: the first
            block those of the first indices, and so on; None where any image is as near as any other.
    """

    spec: str
    labels: Int64[np.ndarray, " images"] | None
    class_names: tuple[str, ...] | None
    skipped: tuple[SkippedImage, ...]
    block_sizes: Int64[np.ndarray, " blocks"] | None = None

    @abstractmethod
    def __init__(self, spec: str, config: DataConfig, num_channels: int) -> None: ...

    @classmethod
    @abstractmethod
    def accepts(cls, spec: str) -> bool:
        """Whether a spec is of this kind (a folder, a Parquet file, …)."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, those skipped while listing not counted."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image, decoded, in the mode of the source's number of channels.

        Raises:
            BadImage: it cannot be read or decoded.
            IndexError: `index` is not in 0 … len − 1.
        """

    def encoded(self, index: int) -> bytes:
        """The content of the image's file, as it is stored; where there is no file, of a PNG of what `load` gives.

        Whether it can be decoded is not looked at.

        Raises:
            BadImage: it cannot be read.
            IndexError: `index` is not in 0 … len − 1.
        """
        return png_of(self.load(index))

    @abstractmethod
    def image_name(self, index: int) -> str:
        """A name for messages, unique in the source, printable and on one line.

        Raises:
            IndexError: `index` is not in 0 … len − 1.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal that changes when the images do."""


def png_of(image: Image.Image) -> bytes:
    """The image as the content of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def checked_index(index: int, length: int) -> int:
    """The index as a plain integer.

    Raises:
        IndexError: it is not in 0 … length − 1.
    """
    if not 0 <= index < length:
        raise IndexError(f"image {index} of a source with {length} images (0 to {length - 1})")
    return int(index)


def printable(name: str) -> str:
    """The name on one line: characters that do not print, and backslashes, as backslash escapes."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(char if char.isprintable() and char != "\\" else _escaped(char) for char in name)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
