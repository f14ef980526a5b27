"""A folder of odd, broken and hostile files, for tests of everything that reads images."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
RED_LEFT = (200, 40, 30)
BLUE_RIGHT = (20, 60, 210)


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Red on the left, blue on the right, black in the top left corner."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = RED_LEFT
    pixels[:, width // 2 :] = BLUE_RIGHT
    pixels[: height // 4, : width // 4] = 0
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The image as the content of a file of that kind."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ramp() -> np.ndarray:
    """Values that rise evenly from 0 to 1 from left to right."""
    return np.tile(np.linspace(0.0, 1.0, SIDE), (SIDE, 1))


def valid_files() -> dict[str, bytes]:
    """Odd files that hold an image nevertheless, by name."""
    colour, grey = picture(), picture().convert("L")
    palette = picture().quantize(8)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture().convert("P"), grey.convert("P")]
    wide = (ramp() * 65535).astype(np.uint16)
    masked = picture().convert("RGBA")
    masked.putalpha(Image.fromarray((ramp() > 0.5).astype(np.uint8) * 255))
    return {
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG", quality=95),
        "sixteen-bit.png": encoded(Image.fromarray(wide), "PNG"),
        "palette-transparent.png": encoded(palette, "PNG", transparency=0),
        "la.png": encoded(masked.convert("LA"), "PNG"),
        "rgba.png": encoded(masked, "PNG"),
        "one-bit.png": encoded(grey.convert("1"), "PNG"),
        "colour-key.png": encoded(colour, "PNG", transparency=BLUE_RIGHT),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(colour, "WEBP", save_all=True, append_images=[grey.convert("RGB")]),
        "lossless.webp": encoded(colour, "WEBP", lossless=True),
        "rotated.jpg": encoded(picture(SIDE, 2 * SIDE), "JPEG", exif=exif, quality=95),
        "rotated.png": encoded(picture(SIDE, 2 * SIDE), "PNG", exif=exif),
        "broken-exif.jpg": encoded(colour, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"),
        "one-pixel.png": encoded(picture(1, 1), "PNG"),
        "very-wide.png": encoded(picture(20_000, 1), "PNG"),
        "very-tall.png": encoded(picture(1, 20_000), "PNG"),
        "float.tif": encoded(Image.fromarray(ramp().astype(np.float32)), "TIFF"),
        "float-large.tiff": encoded(Image.fromarray((ramp() * 5000 - 100).astype(np.float32)), "TIFF"),
        "sixteen-bit.tif": encoded(Image.fromarray(wide), "TIFF"),
        "thirty-two-bit.tif": encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "multi-page.tif": encoded(colour, "TIFF", save_all=True, append_images=[grey]),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True, quality=95),
        "grey.jpg": encoded(grey, "JPEG", quality=95),
        "UPPER.JPG": encoded(colour, "JPEG", quality=95),
        "žluťoučký-猫.png": encoded(colour, "PNG"),
        "new\nline.png": encoded(colour, "PNG"),
        "n" * 250 + ".png": encoded(colour, "PNG"),
        "-rf.png": encoded(colour, "PNG"),
        "plain.bmp": encoded(colour, "BMP"),
        "plain.ppm": encoded(colour, "PPM"),
        "plain.pgm": encoded(grey, "PPM"),
        "png-content.jpg": encoded(colour, "PNG"),
        "trailing-bytes.png": encoded(colour, "PNG") + b"trailing",
    }


def broken_files() -> dict[str, bytes]:
    """Files that look like images by their name and are none, by name."""
    jpeg = encoded(picture(128, 128), "JPEG", quality=95)
    png = encoded(Image.fromarray(_noise(64)), "PNG")
    middle = len(png) // 2
    return {
        "empty.jpg": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[:middle],
        "signature-only.png": png[:8],
        "text.jpg": b"This is no image.\n" * 10,
        "random.png": _noise(16).tobytes(),
        "bomb.png": _png(60_000, 60_000, b"\0" * 100),
        "no-width.png": _png(0, 10, b"\0" * 100),
        "corrupt.png": png[:middle] + bytes(255 - byte for byte in png[middle : middle + 64]) + png[middle + 64 :],
        "header-only.gif": b"GIF89a\x20\x00\x20\x00\x80\x00\x00",
        "page.png": b"<!doctype html><html><body>404 Not Found</body></html>",
        "header-only.tif": b"II*\x00\x08\x00\x00\x00",
        "header-only.bmp": b"BM" + b"\0" * 12,
        "short.ppm": b"P6 32 32 255\n" + b"\0" * 10,
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


def make_hostile_folder(root: Path) -> tuple[set[str], set[str]]:
    """Fills `root` with odd, broken and hostile entries, and some that are no business of ours.

    Returns:
        The names of the entries that hold an image, and of those that a listing or `load` must report; both
        as the operating system gives them.
    """
    valid, bad = valid_files(), broken_files()
    for name, content in {**valid, **bad}.items():
        (root / name).write_bytes(content)
    others = {"folder.png", "dangling.jpg", "loop-a.png", "loop-b.png", "pipe.jpg", "socket-like.png"}
    (root / "folder.png").mkdir()
    (root / "folder.png" / "inside.png").write_bytes(encoded(picture(), "PNG"))
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "loop-a.png").symlink_to(root / "loop-b.png")
    (root / "loop-b.png").symlink_to(root / "loop-a.png")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "notes.txt").write_text("not counted")
    os.mkfifo(root / "pipe.jpg")
    (root / "socket-like.png").symlink_to("/dev/zero")
    names = {*valid, "folder.png/inside.png", "linked.png"}
    (root / "linked.png").symlink_to(root / "rgba.png")
    undecodable = os.fsdecode(b"not-utf8-\xff\xfe.png")
    (root / undecodable).write_bytes(encoded(picture(), "PNG"))
    return {*names, undecodable}, {*bad, *others}


def _noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _png(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
