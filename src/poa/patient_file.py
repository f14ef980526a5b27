"""Writing beside the training that a full disk does not stop."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

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
