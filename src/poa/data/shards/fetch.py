"""Downloads that survive a bad day of the network: tried again, abandoned when they stall, verified."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from poa.config import DataConfig
from poa.data.shards.location import redacted
from poa.errors import DataError
from poa.files import file_sha256
from poa.randomness import generator

MAX_WAIT_SECONDS = 60.0
PART_ENDING = ".part"
_POLL_SECONDS = 0.1
_WORTH_ANOTHER_TRY = (408, 425, 429)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True)
class Content:
    """What a file must hold: its bytes, and their SHA-256 in hexadecimal."""

    num_bytes: int
    sha256: str


class Stopped(Exception):  # noqa: N818 (not an error: who asked for the download has gone)
    """A download ended because it is no longer wanted."""


class Stop:
    """Tells threads, and processes that were started with it, that downloads are no longer wanted.

    It has no lock, so that a signal's handler may set it.
    """

    def __init__(self) -> None:
        self._is_set = multiprocessing.RawValue("b", 0)

    def is_set(self) -> bool:
        """Whether it has come to that."""
        return bool(self._is_set.value)

    def set(self) -> None:
        """Tells it."""
        self._is_set.value = 1

    def clear(self) -> None:
        """Takes it back."""
        self._is_set.value = 0

    def wait(self, seconds: float) -> bool:
        """Waits for it, at most so long; gives back `is_set`."""
        end = time.monotonic() + seconds
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(_POLL_SECONDS, left))
        return self.is_set()


class DiskFull(Exception):  # noqa: N818 (met by making room)
    """There is no space for the download."""


class _OfProcess:
    """When downloads of this process that were given no `Stop` end."""

    stop = Stop()


def end_downloads_with(stop: Stop) -> Stop:
    """From now on, downloads of this process end when `stop` is set, unless they were given another one.

    Returns:
        what has told it until now.
    """
    before, _OfProcess.stop = _OfProcess.stop, stop
    return before


def pause(seconds: float, stop: Stop | None) -> None:
    """Waits; raises `Stopped` when the download is no longer wanted."""
    if (stop or _OfProcess.stop).wait(seconds):
        raise Stopped


def fetch(url: str, target: Path, config: DataConfig, content: Content | None = None, stop: Stop | None = None) -> None:
    """Downloads a file; `target` is there whole and verified, or not at all.

    What may pass (a broken connection, an error of the server, a stall, wrong content) is tried again after waits that
    double; `config` says how often, how soon and what a stall is.

    Args:
        url: what fsspec understands.
        target: where it goes. Scratch files beside it have names that end in `.part`.
        config: `retries`, `retry_seconds`, `stall_seconds`.
        content: what it must hold.
        stop: set when the download is no longer wanted; by default as `end_downloads_with` says.

    Raises:
        DataError: it is not there, access is denied, its driver is not installed, or all tries failed.
        DiskFull: it does not fit the disk.
        Stopped: `stop` was set.
    """
    load_driver(url)
    begin = time.monotonic()
    reason = ""
    for attempt in range(config.retries + 1):
        if attempt:
            pause(_delay(config.retry_seconds, url, attempt), stop)
        with _scratch_beside(target) as part:
            reason = _download(url, part, config.stall_seconds, stop) or _difference(part, content)
            if not reason:
                publish(part, target)
                return
    raise DataError(
        f"{redacted(url)} could not be fetched: {config.retries + 1} tries in {time.monotonic() - begin:.0f} s failed, "
        f"the last because {reason}. When its host answers again, the same command goes on; more patience: "
        f"--data.retries and --data.stall-seconds."
    )


def publish(part: Path, target: Path) -> None:
    """Makes a scratch file the target, after its content has reached the disk."""
    handle = os.open(part, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    part.replace(target)


def load_driver(url: str) -> str:
    """Loads what reads the URL; gives back its scheme.

    Raises:
        DataError: its driver is not known or not installed.
    """
    import fsspec

    scheme = urlsplit(url).scheme.lower()
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        how = f'pip install "poa[{_EXTRAS[scheme]}]"' if scheme in _EXTRAS else f"{error}"
        raise DataError(f"{scheme}:// needs a driver that is not installed: {how}") from error
    except ValueError as error:
        raise DataError(f"{redacted(url)} cannot be read: {redacted(str(error))}.") from error
    return scheme


def filesystem_of(url: str, stall_seconds: float) -> tuple[Any, str]:
    """A fresh file system of fsspec for a URL, and the path in it.

    Raises:
        DataError: as `load_driver`.
    """
    import fsspec

    options = _http_options(stall_seconds) if load_driver(url) in ("http", "https") else {}
    found: tuple[Any, str] = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    return found


def _http_options(stall_seconds: float) -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    # Names and passwords come from ~/.netrc, proxies from the environment; the bytes are wanted as they are stored.
    return {
        "client_kwargs": {"trust_env": True, "timeout": timeout},
        "headers": {"Accept-Encoding": "identity"},
    }


class _Download(threading.Thread):
    """A download in a thread, which can be left to itself when it hangs."""

    def __init__(self, url: str, part: Path, stall_seconds: float) -> None:
        super().__init__(daemon=True, name="poa-download")
        self.url, self.part, self.stall_seconds = url, part, stall_seconds
        self.num_bytes = 0
        self.is_abandoned = False
        self.error: Exception | None = None

    def run(self) -> None:
        """Downloads the file, and keeps the error if that fails; it ends early when it is abandoned."""
        from fsspec.callbacks import Callback

        owner = self

        class Progress(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                owner.num_bytes += inc
                if owner.is_abandoned:
                    raise Stopped

        try:
            filesystem, path = filesystem_of(self.url, self.stall_seconds)
            filesystem.get_file(path, str(self.part), callback=Progress())
        except Exception as error:  # noqa: BLE001 (every driver raises errors of its own; all are reported)
            self.error = error


def _download(url: str, part: Path, stall_seconds: float, stop: Stop | None) -> str:
    """Downloads once; gives back why that failed, or nothing. Raises where another try has no point."""
    thread = _Download(url, part, stall_seconds)
    thread.start()
    seen, since = 0, time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        if thread.num_bytes > seen:
            seen, since = thread.num_bytes, time.monotonic()
        is_wanted = not (stop or _OfProcess.stop).is_set()
        is_stalled = time.monotonic() - since > stall_seconds
        if thread.is_alive() and (is_stalled or not is_wanted):
            thread.is_abandoned = True
            if not is_wanted:
                raise Stopped
            return f"no byte came for {stall_seconds:g} s, after {seen} bytes"
    return "" if thread.error is None else _reason(url, thread.error)


def _reason(url: str, error: Exception) -> str:
    """Why it failed; raises where another try would fail alike."""
    if isinstance(error, DataError):
        raise error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise DiskFull from error
    status = getattr(error, "status", None)
    text = redacted(f"{type(error).__name__}: {error}")[:300]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise DataError(f"there is no {redacted(url)}.") from error
    is_denied = isinstance(error, PermissionError) or "Credential" in type(error).__name__
    if is_denied or (isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY):
        raise DataError(
            f"{redacted(url)} may not be read: {text}. Look at the credentials in the environment; secrets do not "
            f"belong into the URL."
        ) from error
    return text


def _difference(part: Path, content: Content | None) -> str:
    """How the file differs from what it must hold, or nothing."""
    if content is None:
        return ""
    num_bytes = part.stat().st_size
    if num_bytes != content.num_bytes:
        return f"{num_bytes} bytes came instead of {content.num_bytes}"
    if file_sha256(part) != content.sha256:
        return "its SHA-256 is not the one in the index (damaged on the way, or changed since it was indexed)"
    return ""


def _delay(first: float, url: str, attempt: int) -> float:
    """Seconds before a new try: doubled each time, and up to half more or less so that not all come at once."""
    share = float(generator(os.getpid(), "back-off", zlib.crc32(url.encode()), attempt).random())
    return min(MAX_WAIT_SECONDS, first * 2.0 ** (attempt - 1)) * (0.5 + share)


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=PART_ENDING, dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
