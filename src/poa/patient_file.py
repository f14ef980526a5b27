"""Writing beside the training that a full disk does not stop."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any, TextIO

from poa.errors import PoaWarning


class PatientFile:
    """A file that is appended to. What a full disk does not take is kept, and written before what comes next.

    So nothing is missing or torn once there is space again. A `PoaWarning` says once that the file has to wait.

    Raises:
        OSError: on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._unwritten = b""
        self._waits = False

    def write(self, content: bytes) -> None:
        """Adds the bytes at the end, now or later."""
        self._unwritten += content
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._handle, self._unwritten) :]
            self._waits = False
        except OSError as error:
            if not self._waits:
                self._warn(f"{self.path} cannot be written: {error.strerror}. It is tried again; the work goes on.")
            self._waits = True

    def close(self) -> None:
        """Tries a last time."""
        self.write(b"")
        if self._unwritten:
            self._warn(f"{len(self._unwritten):,} bytes of {self.path} could not be written and are lost.")
            self._unwritten = b""
        os.close(self._handle)

    def _warn(self, text: str) -> None:
        warnings.warn(text, PoaWarning, stacklevel=3)


class PatientStream:
    """Standard error, or another stream of text, that a full disk does not stop.

    What the disk does not take waits in the stream's buffer and is tried again with what comes next; what the buffer
    does not hold is lost. There is no place left to say so.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes it now or later; gives back its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            _refuse_all_but_full_disks(error)
            return len(text)

    def flush(self) -> None:
        """Writes what waits, as far as there is space."""
        try:
            self._stream.flush()
        except OSError as error:
            _refuse_all_but_full_disks(error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the stream has)
        return getattr(self._stream, name)


def _refuse_all_but_full_disks(error: OSError) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
