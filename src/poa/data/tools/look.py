"""A look at one image file: whether it decodes, and what it is."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from poa.config import DataConfig
from poa.data.decode import FORMATS, BadImage, decode_image, pixel_limit

EXTENSIONS = {
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "PPM": "ppm",
    "TIFF": "tif",
    "WEBP": "webp",
}
"""The ending of a file's name by Pillow's name of the format. MPO is JPEG with more pictures behind the first."""

_NUM_CHANNELS = 3


class Encoded(Protocol):
    """Image files by index."""

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`."""


class Look(NamedTuple):
    """What an image file that decodes is.

    Attributes:
        digest: the SHA-256 of its size and its upright RGB pixels, transparency over white.
        width: of the upright image.
        height: of the upright image.
        format: Pillow's name of the file's format.
        mode: Pillow's name of the pixels' kind in the file.
    """

    digest: bytes
    width: int
    height: int
    format: str
    mode: str


@dataclass(frozen=True)
class LookAt:
    """By index the `Look` at an image file, or why it cannot be read; it can be pickled.

    Attributes:
        images: the image files.
        config: its limits on pixels and bytes.
    """

    images: Encoded
    config: DataConfig

    def __call__(self, index: int) -> Look | str:
        """The look, or the reason on one line."""
        try:
            content = self.images.encoded(index)
            image = _decoded(content, self.config)
        except BadImage as error:
            return error.reason
        digest = hashlib.sha256(f"{image.width}x{image.height}\n".encode())
        digest.update(image.tobytes())
        return Look(digest.digest(), image.width, image.height, *_header(content, self.config))


@dataclass(frozen=True)
class ReadWhole:
    """By index an image file's content and the ending of its name, or why it does not decode; it can be pickled.

    Attributes:
        images: the image files.
        config: its limits on pixels and bytes.
    """

    images: Encoded
    config: DataConfig

    def __call__(self, index: int) -> tuple[bytes, str] | str:
        """The content and the ending, or the reason on one line."""
        try:
            content = self.images.encoded(index)
            _decoded(content, self.config)
        except BadImage as error:
            return error.reason
        return content, EXTENSIONS[_header(content, self.config)[0]]


def _decoded(content: bytes, config: DataConfig) -> Image.Image:
    return decode_image(content, _NUM_CHANNELS, config.max_pixels, config.max_bytes)


def _header(content: bytes, config: DataConfig) -> tuple[str, str]:
    """Format and mode of an image file that decodes."""
    with pixel_limit(config.max_pixels), Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        return str(opened.format), opened.mode
