"""Fetched shards on the disk: one bounded directory for all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from poa.config import DataConfig
from poa.data.parquet import write_encoded
from poa.data.shards.fetch import DISK_FULL, PART_ENDING, Content, DiskFull, Stop, fetch, pause, publish
from poa.data.shards.location import is_url
from poa.errors import DataError
from poa.files import file_sha256

if sys.platform != "win32":
    import fcntl

GB = 10**9
_LOCK_ENDING = ".lock"
_POLL_SECONDS = 0.05
_TOUCH_SECONDS = 1.0
_MAX_LOSSES = 20
_SHARD_ENDINGS = (".tar", ".images")
_OWN = re.compile(r"([0-9a-f]{64}(?:\.tar|\.images)?)((?:\..+)?\.part|\.lock)?")
"""The names of the cache's files: a key, and what marks scratch files and locks. No other file is ever removed."""


@dataclass(frozen=True)
class CachedShard:
    """A shard as the cache keeps it.

    Attributes:
        key: its name in the cache, which says its content.
        url: where it is fetched from, a URL or the path of a local file.
        content: of what is fetched.
        num_bytes: of what is kept.
        column: Parquet: the column whose images are kept, one after the other; None keeps the file as it is.
    """

    key: str
    url: str
    content: Content
    num_bytes: int
    column: str | None = None

    @property
    def space(self) -> int:
        """Bytes on the disk while it is fetched, at most."""
        is_whole_copy = self.column is None or not is_url(self.url)
        return self.num_bytes if is_whole_copy else self.num_bytes + self.content.num_bytes


class ShardCache:
    """Shards by the content that they have. It can be pickled; all processes with the same directory share it.

    Of several processes that want a shard one fetches it, the others wait; when that one is killed, another takes over.
    A shard appears whole and verified. The least recently used give way before the bound is passed; a reader whose
    shard gives way fetches it again.

    Args:
        config: `cache_dir`, `cache_gb`, and how to fetch.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.folder = Path(config.cache_dir).expanduser()
        self.limit = round(config.cache_gb * GB)
        self._touched: dict[str, float] = {}

    def prepare(self) -> None:
        """Makes the directory, and removes what killed processes left in it.

        Raises:
            DataError: it cannot be written, or the system has no locks of files.
        """
        if sys.platform == "win32":
            raise DataError("shards are fetched on Linux and macOS only. Copy them here, and name the files.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._room_lock():
                self._clear_left_overs()
        except OSError as error:
            raise self._unusable(error) from error

    def check_room(self, num_bytes: int, what: str) -> None:
        """Raises `DataError` when so many bytes cannot be in the cache at the same time; `what` names them."""
        if num_bytes > self.limit:
            raise DataError(
                f"{what} take {num_bytes / GB:.3g} GB, and data.cache_gb is {self.config.cache_gb:g}. Give the cache "
                f"more room, --data.cache-gb {num_bytes / GB * 1.01:.3g}, or need fewer at a time (--data.window)."
            )
        within = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._kept())
        if num_bytes > within:
            raise DataError(
                f"{what} take {num_bytes / GB:.3g} GB, and the disk of {self.folder} has room for {within / GB:.3g}. "
                f"Free some, or name another directory by --data.cache-dir."
            )

    def read(self, shard: CachedShard, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched where it is not there; fewer where the shard ends before.

        Raises:
            DataError: it cannot be fetched.
        """
        for _ in range(_MAX_LOSSES):
            try:
                with self.ensure(shard).open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                continue  # it gave way to another one at this moment
            except OSError as error:
                raise self._unusable(error) from error
        raise DataError(
            f"{shard.url} gave way to other shards {_MAX_LOSSES} times before it could be read. Give the cache more "
            f"room (--data.cache-gb), or fewer processes."
        )

    def fetched_anew(self, url: str) -> Path:
        """A file of which nothing is known, fetched now; its name says its content, so that none in use is replaced.

        Raises:
            DataError: it cannot be fetched, or the disk is full.
        """
        self.prepare()
        key = hashlib.sha256(url.encode()).hexdigest()
        scratch, folder = self.folder / f"{key}.whole{PART_ENDING}", self.folder / ".indexes"
        folder.mkdir(exist_ok=True)
        with self._shard_lock(key, None):
            try:
                fetch(url, scratch, self.config)
                return scratch.replace(folder / file_sha256(scratch))
            except DiskFull as error:
                raise DataError(f"the disk of {self.folder} is full. Name another by --data.cache-dir.") from error

    def ensure(self, shard: CachedShard, stop: Stop | None = None, keep: Collection[str] = ()) -> Path:
        """The shard's file, fetched where it is not there.

        Args:
            shard: the shard.
            stop: set when it is no longer wanted.
            keep: keys of shards that give way last, however long ago they were used.

        Raises:
            DataError: it cannot be fetched, or the disk is full.
            Stopped: `stop` was set.
        """
        path = self.folder / shard.key
        try:
            if not self.touch(shard):
                with self._shard_lock(shard.key, stop) as lock:
                    if not self.touch(shard):
                        self._bring(shard, path, lock, stop, keep)
        except OSError as error:
            raise self._unusable(error) from error
        return path

    def touch(self, shard: CachedShard) -> bool:
        """Whether the shard is there whole; if so it counts as used just now."""
        path = self.folder / shard.key
        try:
            if path.stat().st_size != shard.num_bytes:
                return False
            now = time.monotonic()
            if now - self._touched.get(shard.key, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
                os.utime(path)
                self._touched[shard.key] = now
        except FileNotFoundError:
            return False
        return True

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"the directory for fetched shards, {self.folder}, cannot be used: {error.strerror}. Name another by "
            f"--data.cache-dir."
        )

    def _bring(self, shard: CachedShard, path: Path, lock: int, stop: Stop | None, keep: Collection[str]) -> None:
        while True:
            self._reserve(shard, lock, stop, keep)
            try:
                return self._fetch(shard, path, stop)
            except DiskFull as error:
                self._make_space(shard, error)

    def _fetch(self, shard: CachedShard, path: Path, stop: Stop | None) -> None:
        try:
            if shard.column is None:
                fetch(shard.url, path, self.config, shard.content, stop)
            else:
                self._fetch_images(shard, shard.column, path, stop)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise DiskFull from error
            raise

    def _fetch_images(self, shard: CachedShard, column: str, path: Path, stop: Stop | None) -> None:
        source = Path(shard.url)
        scratch, flat = (path.with_name(f"{path.name}.{part}{PART_ENDING}") for part in ("parquet", "flat"))
        try:
            if is_url(shard.url):
                source = scratch
                fetch(shard.url, scratch, self.config, shard.content, stop)
            write_encoded(source, column, flat)
            if flat.stat().st_size != shard.num_bytes:
                raise DataError(
                    f"{shard.url} has {flat.stat().st_size} bytes of images in its column {column!r}, and "
                    f"{shard.num_bytes} according to the index. Make the index anew: poa data index"
                )
            publish(flat, path)
        finally:
            scratch.unlink(missing_ok=True)
            flat.unlink(missing_ok=True)

    def _reserve(self, shard: CachedShard, lock: int, stop: Stop | None, keep: Collection[str]) -> None:
        """Makes room for a shard within the bound, and notes in its lock file how much is taken."""
        while True:
            with self._room_lock():
                reserved = self._clear_left_overs(besides=shard.key)
                if (room := self.limit - reserved - shard.space) >= 0:
                    self._evict(room, keep)
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, str(shard.space).encode(), 0)
                    return
            if not reserved:
                self.check_room(shard.space, f"{shard.url} and what is needed to read it")
            pause(_POLL_SECONDS, stop)

    def _make_space(self, shard: CachedShard, error: DiskFull) -> None:
        """Removes what is not used, as much as the shard takes; the disk is full of other things if there is none."""
        with self._room_lock():
            total = sum(size for _, size, _ in self._kept())
            self._evict(max(0, total - shard.space))
        if not total:
            raise DataError(
                f"the disk of {self.folder} is full: it has no room for the {shard.space / GB:.3g} GB of {shard.url}. "
                f"Free some, or name another directory by --data.cache-dir."
            ) from error

    def _evict(self, limit: int, keep: Collection[str] = ()) -> None:
        """Removes the least recently used shards, those of `keep` last, until at most `limit` bytes are left."""
        kept = sorted(self._kept(), key=lambda each: (each[2].name in keep, each))
        total = sum(size for _, size, _ in kept)
        for _, size, path in kept:
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _kept(self) -> list[tuple[int, int, Path]]:
        """When each shard was used last, its bytes and its file."""
        found = []
        for name, key, mark in self._own_files():
            if mark is None and key.endswith(_SHARD_ENDINGS):
                try:
                    status = (self.folder / name).lstat()
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime_ns, status.st_size, self.folder / name))
        return found

    def _clear_left_overs(self, besides: str = "") -> int:
        """Removes scratch files of processes that are gone; gives back the bytes that others are fetching now."""
        files = self._own_files()
        live, reserved = {besides}, 0
        for name, key, mark in files:
            if mark != _LOCK_ENDING or key in live:
                continue
            handle = _locked_now(self.folder / name)
            if handle is None:
                live.add(key)
                reserved += _number_in(self.folder / name)
            else:
                (self.folder / name).unlink(missing_ok=True)
                os.close(handle)
        for name, key, mark in files:
            if mark is not None and mark.endswith(PART_ENDING) and key not in live:
                (self.folder / name).unlink(missing_ok=True)
        return reserved

    def _own_files(self) -> list[tuple[str, str, str | None]]:
        """Of every file of the cache its name, its key and what marks it; None for shards."""
        with os.scandir(self.folder) as entries:
            found = [_OWN.fullmatch(entry.name) for entry in entries]
        return [(match[0], match[1], match[2]) for match in found if match is not None]

    @contextmanager
    def _room_lock(self) -> Iterator[None]:
        """Within, no other process makes room."""
        handle = os.open(self.folder / ".room", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    @contextmanager
    def _shard_lock(self, key: str, stop: Stop | None) -> Iterator[int]:
        """Within, no other process fetches the shard; gives the lock file, which is there only while it is held."""
        path = self.folder / f"{key}{_LOCK_ENDING}"
        while (handle := _locked_now(path)) is None:
            pause(_POLL_SECONDS, stop)
        try:
            yield handle
        finally:
            path.unlink(missing_ok=True)
            # Workers that were forked meanwhile have the file open too: closing it would leave it locked.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _locked_now(path: Path) -> int | None:
    """The opened and locked file, or None while another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def _number_in(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0
