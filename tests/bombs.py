"""Image files and archives that are small, or cheap to make, and cost much to read if nothing bounds it."""

from __future__ import annotations

import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from tests.hostile_images import encoded, picture

COMMENT_WITH_ENDS = b"\xff\xfe\x00\x06\xff\xd9\xff\xd9"
"""A JPEG comment that holds what ends an image."""


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8), after: tuple[tuple[bytes, bytes], ...] = ()):
    """A grey PNG with more chunks before and after its pixels; every checksum is right."""
    width, height = size
    rows = zlib.compress(bytes(1 + width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in parts)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"", first: int = 8) -> bytes:
    """A little-endian TIFF with one directory at byte 8; `data` follows it.

    Args:
        tags: by number the type, the count, and the value or the offset.
        data: what follows the directory.
        first: the byte at which the directory lies, as announced.
    """
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    return struct.pack("<2sHI", b"II", 42, first) + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def jpeg_of_scans(side: int, num_scans: int, before: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is there `num_scans` times, each behind some bytes."""
    plain = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    start, end = plain.rindex(b"\xff\xda"), plain.rindex(b"\xff\xd9")
    return plain[:start] + (before + plain[start:end]) * num_scans + b"\xff\xd9"


def image_bombs(side: int, num_pieces: int) -> dict[str, bytes]:
    """By name.

    Args:
        side: of the images that are large.
        num_pieces: chunks, tags and strips of those that have many.
    """
    flat, megabytes = Image.new("L", (side, side)), 64 * 2**20
    squeezed = zlib.compress(bytes(megabytes), 9)
    deflated = tiff(
        {
            **{256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)},
            **{322: (4, 1, 32_000), 323: (4, 1, 32_000), 324: (4, 1, 200), 325: (4, 1, len(squeezed))},
        },
        bytes(70) + squeezed,
    )
    block = b"\x21\xfe" + (b"\xff" + b"c" * 255) * (num_pieces // 10) + b"\x00"
    gif = encoded(picture().quantize(8), "GIF")
    app = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)
    jpeg = encoded(picture(), "JPEG")
    return {
        "flat.png": encoded(flat, "PNG"),
        "flat.gif": encoded(flat.convert("P"), "GIF"),
        "flat.jpg": encoded(flat, "JPEG"),
        "flat.tif": encoded(flat, "TIFF", compression="tiff_adobe_deflate"),
        "float.tif": encoded(flat.convert("F"), "TIFF", compression="tiff_adobe_deflate"),
        "cmyk.jpg": encoded(flat.convert("CMYK"), "JPEG"),
        "rgba.png": encoded(flat.convert("RGBA"), "PNG"),
        "flat.webp": encoded(flat.convert("RGB"), "WEBP", lossless=True),
        "text.png": png(*((b"zTXt", b"k%d\0\0" % place + squeezed) for place in range(8))),
        "itext.png": png(*((b"iTXt", b"k%d\0\1\0\0\0" % place + squeezed) for place in range(8))),
        "text-after.png": png(after=tuple((b"zTXt", b"k%d\0\0" % place + squeezed) for place in range(8))),
        "profile.png": png((b"iCCP", b"p\0\0" + squeezed)),
        "chunks.png": png(*[(b"pRVT", b"")] * num_pieces),
        "chunks-after.png": png(after=((b"pRVT", b""),) * num_pieces),
        "many-texts.png": png(*((b"tEXt", b"key%d\0value" % place) for place in range(num_pieces // 4))),
        "tile.tif": deflated,
        "tags.tif": _overlapping_tags(),
        "strips.tif": _strips(3 * num_pieces),
        "directories.tif": tiff({256: (4, 2**32 - 1, 8), 273: (4, 2**31, 8)}),
        "comments.gif": gif[:-1] + block + gif[-1:],
        "comments-before.gif": gif[: 13 + 3 * 8] + block * 3 + gif[13 + 3 * 8 :],
        "frame.gif": gif[:6] + b"\x01\0\x01\0" + gif[10:],
        "exif.jpg": jpeg[:2] + app * 300 + jpeg[2:],
        "scans.jpg": jpeg_of_scans(side, 2_000),
        "hidden-scans.jpg": jpeg_of_scans(side, 2_000, COMMENT_WITH_ENDS),
        "few-scans.jpg": jpeg_of_scans(side, 50),
        "rows.bmp": _rows(side),
        "plain.ppm": b"P3 %d %d 255\n" % (side, side) + b"1 " * (3 * side**2),
    }


def _overlapping_tags() -> bytes:
    """As many tags as there can be, each of the same megabyte."""
    tags = dict.fromkeys(range(1000, 65000), (7, 2**20, 8))
    return tiff({256: (4, 1, 8), 257: (4, 1, 8), **tags}, bytes(2**20))


def _strips(count: int) -> bytes:
    """An image of very many strips, of which each is one row."""
    tags = {256: (4, 1, 1), 257: (4, 1, count), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 278: (4, 1, 1)}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    return tiff({**tags, 273: (4, count, start)}, bytes(4 * count))


def _rows(side: int) -> bytes:
    """A run-length encoded bitmap of which every row ends at once."""
    rows = b"\x01\x00\x00\x00" * side + b"\x00\x01"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + 4 * 256
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + header + bytes(4 * 256) + rows


def tar_header(name: str | bytes, size: int | bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A header block with a right checksum.

    Args:
        name: at most 100 bytes.
        size: the number of bytes, or the field's 12 bytes as they are.
        kind: the type.
        fields: `sparse`, the bytes from 386 on.
    """
    block = bytearray(512)
    raw = name.encode() if isinstance(name, str) else name
    block[: len(raw)] = raw
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar\x0000"
    for content in fields.values():
        block[386 : 386 + len(content)] = content
    return with_checksum(block)


def with_checksum(block: bytes | bytearray) -> bytes:
    """The header block with the checksum that belongs to it."""
    fixed = bytearray(block)
    fixed[148:156] = b" " * 8
    fixed[148:156] = b"%06o\0 " % sum(fixed)
    return bytes(fixed)


def in_base_256(number: int) -> bytes:
    """A number as GNU tar writes large and negative ones, in 12 bytes."""
    lead = b"\xff" if number < 0 else b"\x80"
    return lead + (number % 256**11).to_bytes(11, "big")


def record(keyword: str, value: str) -> bytes:
    """A pax record with its length."""
    body = f" {keyword}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def padded(content: bytes) -> bytes:
    """The content in whole blocks."""
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """A pax header with those records."""
    body = b"".join(records)
    return tar_header("pax", len(body), kind) + padded(body)


def member(name: str, content: bytes) -> bytes:
    """A regular file."""
    return tar_header(name, len(content)) + padded(content)


END = bytes(1024)


def tar_bombs() -> dict[str, bytes]:
    """Archives that are to be refused whole, by name; the files are small."""
    good, overlap = member("good.png", encoded(picture(), "PNG")), b"2 " * 100_000 + b"="
    return {
        "long-name": tar_header("././@LongLink", 2**40, b"L") + good + END,
        "long-link": tar_header("././@LongLink", 8 * 2**30, b"K") + good + END,
        "pax": tar_header("pax", 8 * 2**30, b"x") + good + END,
        "global": tar_header("pax", 8 * 2**30, b"g") + good + END,
        "huge-name": tar_header("././@LongLink", 2**21, b"L") + bytes(2**21) + good + END,
        "overlapping-records": tar_header("pax", len(overlap), b"x") + padded(overlap) + good + END,
        "digits": tar_header("pax", 2**19, b"x") + b"1" * 2**19 + good + END,
        "many-globals": b"".join(pax(record(f"k{i}", "v" * 100_000), kind=b"g") + good for i in range(12)) + END,
        "chain": pax(record("path", "a.png")) * 1_000 + good + END,
        "backwards": good + pax(record("size", "-4096")) + tar_header("b.png", 0) + END,
        "negative": good + tar_header("b.png", in_base_256(-(10**6))) + END,
        "overflow": good + tar_header("b.png", in_base_256(2**80)) + END,
        "beyond-the-end": good + tar_header("b.png", 2**32) + good + END,
        "sparse-chain": tar_header("b.png", 0, b"S", sparse=bytes(96) + b"\x01" + b"0" * 12)
        + (bytes(504) + b"\x01" + bytes(7)) * 4_000
        + END,
        "sparse-map": pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"))
        + tar_header("b.png", 2**21)
        + b"9999999\n"
        + b"1" * (2**21 - 8)
        + END,
    }


def holes(path: Path, *pieces: tuple[int, bytes], size: int) -> Path:
    """A file of that size that takes the place of its pieces only."""
    with path.open("wb") as file:
        for place, content in pieces:
            file.seek(place)
            file.write(content)
        file.truncate(size)
    return path
