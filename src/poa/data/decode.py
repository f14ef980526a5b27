"""Decoding of image files into 8-bit PIL images, whatever the file holds."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from poa.config import DataConfig
from poa.data.pixels import to_eight_bits
from poa.errors import ConfigError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded; Pillow's others run foreign programs or are not photographs."""

MAX_BYTES = DataConfig.max_bytes
"""Encoded bytes of an image, where nobody says how many it may have."""
MAX_METADATA_BYTES = 8 * 2**20
"""Bytes that are read of a file before its pixels: profiles, tags, comments. A WEBP file is read whole."""
MAX_READS = 1_000_000
"""Pieces in which a file may be read; a PNG image of 100 million pixels in chunks of 8 KiB takes a fifth."""
MAX_SCANS = 64
"""Passes of a JPEG file over its pixels; encoders make about ten."""

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
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_JPEG_SCAN, _JPEG_END, _JPEG_BARE = 0xDA, 0xD9, (0x01, 0xD8)
_TILE_TAGS = (322, 323)
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


def decode_image(
    file: str | os.PathLike[str] | bytes, num_channels: int, max_pixels: int, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """The first frame of an image file, upright and 8-bit, fully loaded.

    EXIF orientation is applied. 16-bit, 32-bit and floating-point greys are scaled to 8 bits
    (see `poa.data.pixels`). Transparency is laid over white unless alpha is asked for.

    Args:
        file: the path of the file, or its content.
        num_channels: 1, 3 or 4: the image has mode "L", "RGB" or "RGBA".
        max_pixels: images whose header announces more pixels are refused before they are decoded.
        max_bytes: larger files are refused unread.

    Memory is bounded by twice `max_bytes` and about thirty bytes for each of `max_pixels`, whatever the file says of
    itself; the time by the pixels times `MAX_SCANS`.

    Raises:
        BadImage: the file cannot be read or decoded, or is too large.
        ConfigError: `num_channels` is not 1, 3 or 4.
    """
    mode = mode_of_channels(num_channels)
    try:
        return _decode(_Content(image_bytes(file, max_bytes)), mode, max_pixels)
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


class _Content(io.BytesIO):
    """The bytes of an image file, of which a decoder reads no more, and no more often, than images need."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.content = content
        is_webp = content[8:12] == b"WEBP"
        self.num_left = len(content) * 2 if is_webp else MAX_METADATA_BYTES
        self.num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes.

        Raises:
            OSError: too many were read before the pixels, or too often.
        """
        content = super().read(size)
        self.num_left -= len(content)
        self.num_reads += 1
        if self.num_left < 0:
            raise OSError(f"more than {MAX_METADATA_BYTES} bytes of metadata")
        if self.num_reads > MAX_READS:
            raise OSError(f"more than {MAX_READS} pieces")
        return content

    def begin_pixels(self) -> None:
        """What is read from now on is no metadata."""
        self.num_left = 4 * len(self.content)


def _decode(stream: _Content, mode: str, max_pixels: int) -> Image.Image:
    with pixel_limit(max_pixels):
        opened = Image.open(stream, formats=FORMATS)
        _require_pixels(opened.size, max_pixels)
        if opened.format == "TIFF":
            width, height = (int(opened.tag_v2.get(tag, 1)) for tag in _TILE_TAGS)  # type: ignore[attr-defined]
            _require_pixels((width, height), max_pixels)
    if stream.content.startswith(b"\xff\xd8") and not _is_one_scan(opened, stream.content, stream.tell()):
        _require_few_scans(stream.content, stream.tell())
    stream.begin_pixels()
    opened.load()
    _require_pixels(opened.size, max_pixels)
    orientation = _orientation(opened)
    image = _with_mode(to_eight_bits(opened), mode)
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _require_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(f"has no pixels ({width}×{height})")
    if width * height > max_pixels:
        raise BadImage(f"{width}×{height} is more than {max_pixels} pixels (data.max_pixels)")


def _is_one_scan(opened: Image.Image, content: bytes, start: int) -> bool:
    """Whether the scan whose data begin there has all of a JPEG image: the decoder then looks at no other."""
    num_components = getattr(opened, "layers", 0)
    header = b"\xff\xda\x00" + bytes((6 + 2 * num_components, num_components))
    return "progressive" not in opened.info and content.startswith(header, start - 8 - 2 * num_components)


def _require_few_scans(content: bytes, start: int) -> None:
    """Refuses a JPEG file with many scans: each costs a pass over all pixels, and needs a few bytes only.

    Args:
        content: of the file.
        start: where the data of the first scan lie.
    """
    if content.count(b"\xff\xda", start) < MAX_SCANS:
        return
    count = 1
    while (found := _JPEG_MARKER.search(content, start)) and (marker := content[found.end() - 1]) != _JPEG_END:
        count += marker == _JPEG_SCAN
        if count > MAX_SCANS:
            raise BadImage(f"has more than {MAX_SCANS} scans")
        length = 0 if marker in _JPEG_BARE else int.from_bytes(content[found.end() : found.end() + 2], "big")
        start = found.end() + length


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


def image_bytes(file: str | os.PathLike[str] | bytes, max_bytes: int) -> bytes:
    """The content of the file, or the content given.

    Raises:
        BadImage: it is empty, has more bytes, or the path is that of no regular file.
        OSError: the file cannot be read.
    """
    if isinstance(file, bytes):
        content, num_bytes = file, len(file)
    else:
        status = os.stat(file)  # noqa: PTH116 (names that are not valid UTF-8 included)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is not a regular file")
        content, num_bytes = b"", status.st_size
    if num_bytes == 0:
        raise BadImage("is empty (zero bytes)")
    if num_bytes > max_bytes:
        raise BadImage(f"has {num_bytes} bytes, more than {max_bytes} (data.max_bytes)")
    if not isinstance(file, bytes):
        with Path(file).open("rb") as stream:
            content = stream.read(max_bytes)
    return content


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
