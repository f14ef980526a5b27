"""One run at a time in a run directory."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from poa.data.base import printable
from poa.distributed import Ranks
from poa.errors import CheckpointError, PoaWarning

LOCK_FILE = ".lock"
LEASE_SECONDS = 120.0
"""How long a lock of another machine is waited for: a file server frees those of a machine that died after its lease,
usually 90 seconds (NFSv4: RFC 8881, section 8.3)."""
POLL_SECONDS = 1.0


class Holder(NamedTuple):
    """Who has a lock."""

    host: str
    pid: int
    since: str


_held: dict[Path, Holder] = {}
"""The locks of this process: the system does not keep two of one process apart."""


class RunLock:
    """While it is open, no other run can begin in the directory: the main process has a lock on `RUN/.lock`.

    It is POSIX's record lock: the system frees it when the process ends, however it ends; data workers do not inherit
    it; file servers know it. A process loses it by closing any descriptor of the file, so nothing else may open it.
    Reading a run needs no lock.

    Args:
        folder: the run directory. If it is not there it is made, and removed on leaving if nothing came into it.
        ranks: the place of this process; only the main one locks.

    Raises:
        CheckpointError: on entering: another run uses the directory, or it cannot be written.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self._path = (folder / LOCK_FILE).resolve()
        self._handle: int | None = None
        self._made = False

    def __enter__(self) -> Self:
        if not self.ranks.is_main:
            return self
        own = Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
        holder = _held.setdefault(self._path, own)
        if holder is not own:
            raise self._refusal(holder)
        try:
            self._open(own)
        except BaseException:
            self._free()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.ranks.is_main:
            self._free()

    def _open(self, own: Holder) -> None:
        try:
            while self._handle is None:
                is_new = not self.folder.exists()
                self.folder.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._lock(self._handle, own.host)
                if not self._is_there(self._handle):
                    self._close()
            self._made = is_new
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(own._asdict()).encode(), 0)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.folder}: {error.strerror}.") from error

    def _is_there(self, handle: int) -> bool:
        """Whether the open file is the one in the directory: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except FileNotFoundError:
            return False

    def _lock(self, handle: int, host: str) -> None:
        """Takes the lock. A holder on this machine lives, so it is refused at once; another may have died."""
        deadline: float | None = None
        while not self._try(handle):
            holder = _read(handle)
            if holder is None or holder.host == host:
                raise self._refusal(holder)
            if deadline is None:
                deadline = time.monotonic() + LEASE_SECONDS
                self._warn(f"{self._used_by(holder)} If that machine is gone, its lock ends in {LEASE_SECONDS:g} s.")
            if time.monotonic() >= deadline:
                raise self._refusal(holder)
            time.sleep(POLL_SECONDS)

    def _try(self, handle: int) -> bool:
        """Whether no other process has the lock; with a warning where there are no locks."""
        try:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except (ImportError, OSError) as error:
            self._warn(f"{self.folder} cannot be locked ({error}): see to it that no second run begins there.")
        return True

    def _free(self) -> None:
        is_empty = self._made and list(self.folder.glob("*")) == [self.folder / LOCK_FILE]
        if is_empty:
            self._path.unlink()
        self._close()
        if is_empty:
            with suppress(OSError):  # another run may have begun in it
                self.folder.rmdir()
        self._made = False
        del _held[self._path]

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _used_by(self, holder: Holder | None) -> str:
        who = "another process" if holder is None else "process {1} on {0} since {2}".format(*holder)
        return f"{self.folder} is in use by a run: {who}."

    def _refusal(self, holder: Holder | None) -> CheckpointError:
        return CheckpointError(f"{self._used_by(holder)} Wait for its end, stop it, or name another --out.")

    def _warn(self, text: str) -> None:
        warnings.warn(text, PoaWarning, stacklevel=4)


def _read(handle: int) -> Holder | None:
    """Who the file says has the lock; None where it does not say it (yet)."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(os.pread(handle, 1000, 0))
        return Holder(printable(str(found["host"])), int(found["pid"]), printable(str(found["since"])))
    return None
