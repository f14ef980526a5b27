"""Where shards lie: specs with URLs, folders and numbered patterns, taken apart and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from poa.data.base import printable
from poa.errors import DataError

INDEX_NAME = "poa-index.safetensors"
"""The file that an index is looked for in, beside the shards."""

KINDS = {".tar": "tar", ".parquet": "parquet"}
"""The kinds of shards by the ending of their names."""

MAX_SHARDS = 1_000_000

_PATTERN = re.compile(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", re.DOTALL)
_WITH_KEY = re.compile(r"(\w[\w+.-]*://)[^/\s'\"]*@|(?:\?|(?<=\S)#)[^\s'\")]*")
_OWN_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "http": "the file ~/.netrc (or NETRC in the environment)",
    "https": "the file ~/.netrc (or NETRC in the environment)",
    "hf": "HF_TOKEN, or `hf auth login`",
}


@dataclass(frozen=True)
class Location:
    """Some shards that lie together.

    Attributes:
        base: the URL or the local folder that the names are relative to, without a slash at its end.
        names: the shards; empty where the spec names the folder only.
    """

    base: str
    names: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether the shards are files of this machine (or of a mounted file system)."""
        return not is_url(self.base)

    def of(self, name: str) -> str:
        """The URL or path of something with a name relative to the base."""
        return f"{self.base}/{name}" if self.base else name


def is_url(spec: str) -> bool:
    """Whether it begins like `s3://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", spec) is not None


def is_pattern(spec: str) -> bool:
    """Whether it is like `shards-{0000..0009}.tar`."""
    return _PATTERN.fullmatch(spec) is not None


def folder_of(spec: str) -> str:
    """What comes before the last slash of a shard's path or URL; of a pattern, the part that all its shards share."""
    return spec.partition("{")[0].rpartition("/")[0]


def kind_of(name: str) -> str | None:
    """By the ending of the name: "tar", "parquet", or None for anything else."""
    return KINDS.get(Path(name).suffix.lower())


def redacted(text: str) -> str:
    """The text without user names, passwords and queries of URLs, on one line."""
    return printable(" ".join(_WITH_KEY.sub(lambda found: f"{found[1] or ''}…", text).split()))


def locate(spec: str) -> Location:
    """The shards that a spec names: one file, a pattern like `shards-{0000..0009}.tar` or a folder, local or not.

    Raises:
        DataError: the URL holds a password or a query, several URLs in one, or a name that leads out of its folder; or
            a pattern's numbers fall.
    """
    if is_url(spec):
        spec = _checked_url(spec)
    if is_url(spec) and urlsplit(spec).scheme.lower() == "file":
        spec = unquote(spec[len("file://") :])
    if not is_url(spec):
        spec = str(Path(spec).expanduser())
    paths = expanded(spec)
    if kind_of(spec) is None:
        return Location(spec.rstrip("/") or "/", ())
    folder = folder_of(spec)
    start = len(folder) + 1 if folder else 0
    names = tuple(path[start:] for path in paths)
    for name in names:
        check_name(name, f"{printable(spec)!r}")
    return Location(folder, names)


def expanded(spec: str) -> list[str]:
    """The names that a pattern stands for, in the order of its numbers; the spec itself where it is none.

    Raises:
        DataError: the pattern's numbers fall, or it stands for more than a million names.
    """
    found = _PATTERN.fullmatch(spec)
    if found is None:
        return [spec]
    before, first, last, after = found.groups()
    if not 0 <= int(last) - int(first) < MAX_SHARDS:
        raise DataError(
            f"{printable(spec)!r} counts from {first} to {last}. Give the smaller number first, and name at most "
            f"{MAX_SHARDS:,} shards."
        )
    return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]


def check_name(name: str, where: str) -> None:
    """Raises `DataError` unless the name stays below the folder that it is relative to and is safe in a URL."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or re.search(r"[\\?#:{}]", name):
        raise DataError(
            f"{where} names the shard {printable(name)!r}. A shard's name is a path below its folder, of characters "
            f"that print and without ?, #, :, braces and backslashes. Rename it."
        )


def _checked_url(spec: str) -> str:
    try:
        parts = urlsplit(spec)
        scheme, user, password = parts.scheme.lower(), parts.username, parts.password
    except ValueError as error:
        raise DataError(f"{redacted(spec)!r} is no URL: {error}.") from error
    if "::" in spec:
        raise DataError(f"{redacted(spec)!r} is several URLs in one. Give one; what is fetched is kept by poa itself.")
    if password is not None or (user is not None and scheme in ("http", "https", "ftp")) or "?" in spec or "#" in spec:
        instead = _OWN_CREDENTIALS.get(scheme, "the environment or the configuration of its driver (fsspec)")
        raise DataError(
            f"{redacted(spec)!r} has a user, a password or a query (?…). The URL is written into the run's files, "
            f"where no secret belongs. Give it without; access is granted by {instead}."
        )
    return spec
