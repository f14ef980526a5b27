"""The images of a source in one flat file, for sources that are best read in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from poa.data.base import ImageSource, checked_index
from poa.data.decode import BadImage
from poa.data.tools.ahead import Ahead

_FLUSH_BYTES = 64_000_000


class FlatCopy:
    """The image files of a source one after the other in a file, to be read in any order; it can be pickled.

    `images.bin` has the contents, `images.sizes` their sizes as 64-bit integers of the machine; of an image that cannot
    be read, the reason stands in its place and its size is negative. A copy that was interrupted is gone on with.

    Args:
        source: the images.
        folder: where the two files go.
        on_progress: called with the images copied and all of them.
    """

    def __init__(
        self, source: ImageSource, folder: Path, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._contents, self._sizes_file = folder / "images.bin", folder / "images.sizes"
        folder.mkdir(parents=True, exist_ok=True)
        self._complete(source, self._begin(), on_progress)
        self._sizes = np.fromfile(self._sizes_file, np.int64)
        self._ends = np.cumsum(np.abs(self._sizes))

    def encoded(self, index: int) -> bytes:
        """See `ImageSource.encoded`."""
        place = checked_index(index, len(self._sizes))
        size = abs(int(self._sizes[place]))
        with self._contents.open("rb") as file:
            file.seek(int(self._ends[place]) - size)
            content = file.read(size)
        if self._sizes[place] < 0:
            raise BadImage(content.decode())
        return content

    def _begin(self) -> int:
        """Cuts off what was not written whole; gives back the images that are there."""
        for file in (self._contents, self._sizes_file):
            file.touch()
        sizes = np.fromfile(self._sizes_file, np.int64)
        ends = np.cumsum(np.abs(sizes))
        num_there = int(np.searchsorted(ends, self._contents.stat().st_size, side="right"))
        os.truncate(self._contents, int(ends[num_there - 1]) if num_there else 0)
        os.truncate(self._sizes_file, num_there * sizes.itemsize)
        return num_there

    def _complete(self, source: ImageSource, start: int, on_progress: Callable[[int, int], None] | None) -> None:
        sizes = list[int]()
        with self._contents.open("ab") as contents, self._sizes_file.open("ab") as sizes_file, Ahead(source) as ahead:
            for index in range(start, len(source)):
                ahead.reached(index)
                size, content = _content(source, index)
                contents.write(content)
                sizes.append(size)
                if index + 1 == len(source) or sum(map(abs, sizes)) >= _FLUSH_BYTES:
                    # The contents are on disk before a size says so.
                    _flush(contents.flush, contents.fileno())
                    np.array(sizes, np.int64).tofile(sizes_file)
                    sizes = []
                    if on_progress is not None:
                        on_progress(index + 1, len(source))


def _content(source: ImageSource, index: int) -> tuple[int, bytes]:
    try:
        content = source.encoded(index)
    except BadImage as error:
        reason = error.reason.encode()
        return -len(reason), reason
    return len(content), content


def _flush(flush: Callable[[], None], handle: int) -> None:
    flush()
    os.fsync(handle)
