"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from poa.errors import CheckpointError, PoaError

MAX_JSON_BYTES = 64 * 2**20
"""The largest JSON file that is read. The index of a large family is a hundredth of it."""


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A scratch file that becomes `path`, flushed to disk, when the block ends well, and vanishes when it does not.

    Its `name` is its path, for libraries that write by name; they may put another file in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        with scratch.open("wb") as file:
            yield file
        sync_path(scratch)
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: a reader sees the old content or the new, never a part."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 (JSON)
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_value(text: str | bytes) -> Any:  # noqa: ANN401 (JSON)
    """The JSON value that a text holds.

    Raises:
        ValueError: it is no JSON, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(
    path: Path, error: type[PoaError] = CheckpointError, remedy: str = "Mend it, or remove it."
) -> dict[str, Any]:
    """The JSON object that a file of at most `MAX_JSON_BYTES` holds.

    Args:
        path: the file.
        error: what is raised.
        remedy: a sentence that ends the message: what the user can do.

    Raises:
        error: it is no regular file, cannot be read, is larger, or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no regular file. {remedy}")
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB. {remedy}")
        found = json_value(content)
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}. {remedy}") from cause
    except ValueError as cause:
        raise error(f"{path} is damaged: {str(cause)[:200]}. {remedy}") from cause
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: it holds no JSON object but a {type(found).__name__}. {remedy}")
    return found


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
        swap_directory(scratch, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"cannot write {path}: {error.strerror}. Nothing of it is left behind.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def swap_directory(scratch: Path, path: Path) -> None:
    """Gives a complete directory the name `path`, in place of what has it; flushed to disk.

    A process killed in between leaves the old one as `.NAME.old-PID`.
    """
    if not path.exists():
        scratch.rename(path)
    else:
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        scratch.rename(path)
        shutil.rmtree(old)
    sync_path(path.parent)


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            sync_path(file)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Flushes a file or a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
