"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poa.errors import CheckpointError


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (JSON)
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_writable(path: Path) -> None:
    """Raises `CheckpointError` unless a file can be written at `path`, before work is done for it."""
    if path.is_dir():
        raise CheckpointError(f"cannot write {path}: it is a directory. Name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}.") from error


@contextmanager
def replace_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `path` when the block ends well, and vanishes when it does not.

    Every file in it is flushed to disk before the rename.

    Raises:
        CheckpointError: `path` holds something and `overwrite` is False, or it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise CheckpointError(
            f"{path} is there already. Name another place, or allow it to be overwritten (--overwrite)."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}.") from error
    try:
        yield scratch
        _sync_tree(scratch)
        scratch.chmod(0o755)
        _swap(scratch, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"cannot write {path}: {error.strerror}. Nothing of it is left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, path: Path) -> None:
    if not path.exists():
        scratch.rename(path)
    else:
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        scratch.rename(path)
        shutil.rmtree(old)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
