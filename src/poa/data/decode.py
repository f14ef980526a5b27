"""Decoding of image files into 8-bit PIL images, whatever the file holds."""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from poa.data.pixels import to_eight_bits
from poa.errors import ConfigError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded; Pillow's others run foreign programs or are not photographs."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""The mode of the decoded image by number of channels."""

_DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    struct.error,
    zlib.error,
)
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_limit_lock = threading.RLock()


class BadImage(Exception):  # noqa: N818 (a finding about a file, reported and skipped; not a PoaError)
    """A file that cannot be decoded.

    Attributes:
        reason: why, in a few words on one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def mode_of_channels(num_channels: int) -> str:
    """The PIL mode of images with that many channels: 1 "L", 3 "RGB", 4 "RGBA".

    Raises:
        ConfigError: another number of channels.
    """
    if num_channels not in MODES:
        nearest = min(MODES, key=lambda channels: abs(channels - num_channels))
        raise ConfigError(
            f"model.num_channels must be 1 (grey), 3 (colour) or 4 (colour and alpha) for images from files; "
            f"got {num_channels!r}. Nearest: {nearest}. Give other images as an ImageSource of your own."
        )
    return MODES[num_channels]


def decode_image(file: str | os.PathLike[str] | bytes, num_channels: int, max_pixels: int) -> Image.Image:
    """The first frame of an image file, upright and 8-bit, fully loaded.

    EXIF orientation is applied. 16-bit, 32-bit and floating-point greys are scaled to 8 bits
    (see `poa.data.pixels`). Transparency is laid over white unless alpha is asked for.

    Args:
        file: the path of the file, or its content.
        num_channels: 1, 3 or 4: the image has mode "L", "RGB" or "RGBA".
        max_pixels: images whose header announces more pixels are refused before they are decoded.

    Raises:
        BadImage: the file cannot be read or decoded, or is too large.
        ConfigError: `num_channels` is not 1, 3 or 4.
    """
    mode = mode_of_channels(num_channels)
    try:
        with _opened(file) as stream:
            return _decode(stream, mode, max_pixels)
    except _DECODER_ERRORS as error:
        raise BadImage(_reason(error)) from error


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Within, Pillow's own limit is `max_pixels` and is an error; its warnings about metadata are silent.

    Pillow keeps its limit in a global variable, so only one thread at a time is within.
    """
    with _limit_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(stream: BinaryIO, mode: str, max_pixels: int) -> Image.Image:
    with pixel_limit(max_pixels):
        opened = Image.open(stream, formats=FORMATS)
        width, height = opened.size
        if width < 1 or height < 1:
            raise BadImage(f"has no pixels ({width}×{height})")
        if width * height > max_pixels:
            raise BadImage(f"{width}×{height} is more than {max_pixels} pixels (data.max_pixels)")
    opened.load()
    orientation = _orientation(opened)
    image = _with_mode(to_eight_bits(opened), mode)
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where the file says none or its EXIF block is damaged."""
    try:
        with pixel_limit(image.width * image.height):
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _with_mode(image: Image.Image, mode: str) -> Image.Image:
    if _is_transparent(image):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if mode != "RGBA":
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


@contextmanager
def _opened(file: str | os.PathLike[str] | bytes) -> Iterator[BinaryIO]:
    if isinstance(file, bytes):
        if not file:
            raise BadImage("is empty (zero bytes)")
        yield io.BytesIO(file)
        return
    status = os.stat(file)  # noqa: PTH116 (names that are not valid UTF-8 included)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("is not a regular file")
    if status.st_size == 0:
        raise BadImage("is empty (zero bytes)")
    with Path(file).open("rb") as stream:
        yield stream


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not an image, or of a format that is not read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "announces more pixels than data.max_pixels"
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    text = " ".join(str(error).split())[:200]
    return f"cannot be decoded: {text or type(error).__name__}"
