"""The headers of a tar archive that nobody vouches for: in bounded memory, and always forward."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

MAX_HEADER_BYTES = 2**20
"""The most bytes of headers that one member may have, and all global headers together."""

_ERRORS = (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NUMBER = re.compile(rb"[0-9]{256}")


class HeaderError(Exception):
    """The archive cannot be read on from here; why, in a few words."""


class HeaderStream:
    """An archive as the library may read it: few bytes for each member, pax records only if they are well-formed.

    The library takes what a header announces into memory at once, however much, and records that overlap into
    quadratically more.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._stream = stream
        self._num_read, self._is_pax = 0, False

    def begin_member(self) -> None:
        """What is read from now on belongs to another member."""
        self._num_read = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes.

        Raises:
            tarfile.ReadError: the member's headers are too long, or its pax records are damaged.
        """
        if not 0 <= size <= MAX_HEADER_BYTES - self._num_read:
            raise tarfile.ReadError(f"the headers of a member have more than {MAX_HEADER_BYTES} bytes")
        content = self._stream.read(size)
        self._num_read += size
        if self._is_pax:
            _check_records(content)
        # A block of that type is followed by its records, even if they are none.
        self._is_pax = not self._is_pax and size == tarfile.BLOCKSIZE and content[156:157] in _PAX_TYPES
        return content


def tar_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member of an archive, in order, from its headers; the place of the stream may be changed in between.

    Raises:
        HeaderError: the archive is damaged, cut short, or does not go on where a member ends.
    """
    headers = HeaderStream(stream)
    try:
        with tarfile.TarFile(fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape") as archive:  # type: ignore[arg-type]
            last = -1
            while (member := archive.next()) is not None:
                if archive.offset <= last:
                    raise HeaderError("a member ends before it begins")
                if sum(len(name) + len(value) for name, value in archive.pax_headers.items()) > MAX_HEADER_BYTES:
                    raise HeaderError(f"its global headers have more than {MAX_HEADER_BYTES} bytes")
                last = archive.offset
                # The archive's own list would grow with it.
                archive.members.clear()  # type: ignore[attr-defined]
                yield member
                headers.begin_member()
            place = archive.offset
    except _ERRORS as error:
        raise HeaderError(" ".join(str(error).split())[:200]) from error
    _require_end(stream, place)


def _require_end(stream: BinaryIO, place: int) -> None:
    """The library takes what it cannot read for the end; the end is a block of zeros (POSIX, pax, "ustar")."""
    stream.seek(place)
    end = stream.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise HeaderError(f"it is cut short at byte {place}: there is no end of the archive")
    if any(end):
        raise HeaderError(f"it is damaged at byte {place}: there is no header and no end of the archive")


def _check_records(content: bytes) -> None:
    """Refuses pax records that are not as POSIX has them (pax, LENGTH KEYWORD=VALUE and a new line)."""
    if _LONG_NUMBER.search(content):
        raise tarfile.ReadError("a pax header has a number of hundreds of digits")
    start = 0
    while start < len(content) and content[start]:
        digits, _, rest = content[start : start + 9].partition(b" ")
        end = start + int(digits) if digits.isdigit() and rest else start
        equals = content.find(b"=", start, end)
        if equals < 0 or end > len(content) or content[end - 1] != ord("\n"):
            raise tarfile.ReadError("a pax header is damaged")
        start = end
