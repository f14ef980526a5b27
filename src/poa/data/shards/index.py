"""The index of a set of shards: where every image lies, in one file that all processes map into memory."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int64, UInt8

from poa.data.base import SkippedImage, printable
from poa.data.shards.location import KINDS, MAX_SHARDS, check_name
from poa.errors import DataError
from poa.files import json_value, replace_file

FORMAT = "poa-index"
VERSION = 1

_TYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_ARRAYS = {"starts": "I64", "offsets": "I64", "sizes": "I64", "name_ends": "I64", "names": "U8", "skipped": "U8"}
_LABELS = {"labels": "I64"}
_MAX_HEADER_BYTES = 256 * 2**20
_MAX_BYTES = 2**62
_CHUNK = 2**20


class Shard(NamedTuple):
    """One shard.

    Attributes:
        name: relative to the folder or URL of the set.
        num_bytes: of the file.
        sha256: of the file, in hexadecimal.
        num_stored: bytes that the offsets refer to: those of the file, or of a Parquet file's images one after the
            other.
    """

    name: str
    num_bytes: int
    sha256: str
    num_stored: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a set of shards lie. Image i of the set is image i − starts[s] of shard s.

    Attributes:
        kind: what the shards are.
        column: Parquet: the column of images; None in tar archives.
        shards: in order of name.
        class_names: the name of every class, or None where they are not known.
        skipped: images found unusable when the index was made.
        starts: the first image of every shard, and the number of images.
        offsets: of every image's first byte in its shard.
        sizes: its bytes.
        name_ends: where its name ends in `names`.
        names: the names in the shards, one after the other, UTF-8.
        labels: the class of every image; None where there are none.
    """

    kind: Literal["tar", "parquet"]
    column: str | None
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] | None
    skipped: tuple[SkippedImage, ...]
    starts: Int64[np.ndarray, " shards+1"]
    offsets: Int64[np.ndarray, " images"]
    sizes: Int64[np.ndarray, " images"]
    name_ends: Int64[np.ndarray, " images"]
    names: UInt8[np.ndarray, " bytes"]
    labels: Int64[np.ndarray, " images"] | None

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, place: int) -> str:
        """The shard and the name in it, printable: `shard-0.tar/cat/1.jpg`, or `train-0.parquet:17`."""
        shard = self.shards[self.shard_of(place)].name
        start = int(self.name_ends[place - 1]) if place else 0
        name = self.names[start : int(self.name_ends[place])].tobytes().decode("utf-8", "surrogateescape")
        return printable(f"{shard}{'/' if self.kind == 'tar' else ':'}{name}")

    def shard_of(self, place: int) -> int:
        """The shard that an image lies in."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all of it."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for array in self._arrays().values():
            for start in range(0, len(array), _CHUNK):
                digest.update(np.ascontiguousarray(array[start : start + _CHUNK]).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the index: a safetensors file whose metadata is a JSON object.

        Raises:
            DataError: it cannot be written.
        """
        from safetensors.numpy import save_file

        try:
            with replace_file(path) as file:
                save_file(self._arrays(), file.name, {FORMAT: json.dumps(self._header())})
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}.") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        lines = "".join(json.dumps(list(bad)) + "\n" for bad in self.skipped).encode()
        arrays = {name: getattr(self, name) for name in _ARRAYS if name != "skipped"}
        arrays["skipped"] = np.frombuffer(lines, np.uint8)
        return arrays if self.labels is None else {**arrays, "labels": self.labels}

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "column": self.column,
            "num_images": len(self),
            "class_names": None if self.class_names is None else list(self.class_names),
            "shards": [shard._asdict() for shard in self.shards],
        }


def open_index(path: Path, *, is_verified: bool = False) -> ShardIndex:
    """The index in a file, mapped into memory.

    Args:
        path: the file.
        is_verified: it was opened before, by another process: the arrays are not looked through once more.

    Raises:
        DataError: it is not there or no index, or anything in it does not fit together.
    """
    where = printable(str(path))
    try:
        header, arrays = _mapped(path)
        index = _index_of(header, arrays)
        if not is_verified:
            _check_arrays(index)
    except OSError as error:
        raise DataError(f"the index {where} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise DataError(
            f"{where} is no index of shards, or a damaged one: {reason}. Make it anew: poa data index"
        ) from error
    return index


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON object in the metadata and the arrays, which lie in the file and are not loaded.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, little-endian; the header, a
    JSON object; the tensors.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        _require(size >= 8 and length <= min(size - 8, _MAX_HEADER_BYTES), "its header does not fit the file")
        entries = json_value(file.read(length))
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _require(isinstance(entries, dict), "its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    _require(isinstance(metadata, dict) and isinstance(metadata.get(FORMAT), str), f"it has no {FORMAT!r} metadata")
    _require(_ARRAYS.keys() <= entries.keys() <= (_ARRAYS | _LABELS).keys(), "it has other arrays than an index")
    arrays, begin = {}, 8 + length
    for name, entry in entries.items():
        kind = (_ARRAYS | _LABELS)[name]
        _require(entry["dtype"] == kind, f"{name} has the type {entry['dtype']!r}")
        start, end = map(_whole, entry["data_offsets"])
        _require(0 <= start <= end <= size - begin, f"{name} does not lie in the file")
        count, rest = divmod(end - start, _TYPES[kind].itemsize)
        _require(rest == 0 and entry["shape"] == [count], f"{name} has the shape {entry['shape']!r}")
        arrays[name] = np.frombuffer(whole, _TYPES[kind], count, begin + start)
    return json_value(metadata[FORMAT]), arrays


def _index_of(header: Any, arrays: dict[str, np.ndarray]) -> ShardIndex:  # noqa: ANN401 (JSON from anywhere)
    _require(isinstance(header, dict) and header.get("format") == FORMAT, f"its metadata is not {FORMAT!r}")
    if header["version"] != VERSION:
        raise ValueError(f"its version is {header['version']!r}, and this poa reads version {VERSION}")
    kind, column, names = header["kind"], header["column"], header["class_names"]
    _require(kind in KINDS.values(), f"its shards are of the kind {kind!r}")
    _require(isinstance(column, str) if kind == "parquet" else column is None, f"its column is {column!r}")
    _require(names is None or _is_list_of(names, str), "its class names are no list of names")
    _require(_is_list_of(header["shards"], dict) and len(header["shards"]) <= MAX_SHARDS, "its shards are no list")
    shards = tuple(_shard(entry) for entry in header["shards"])
    _require(
        [shard.name for shard in shards] == sorted({shard.name for shard in shards}), "its shards are not in order"
    )
    _require(header["num_images"] == len(arrays["offsets"]), f"it has not {header['num_images']!r} images")
    skipped = [json_value(line) for line in arrays.pop("skipped").tobytes().splitlines()]
    for bad in skipped:
        _require(_is_list_of(bad, str) and len(bad) == 2, f"a skipped image is {bad!r}")
    return ShardIndex(
        kind=cast(Literal["tar", "parquet"], kind),
        column=column,
        shards=shards,
        class_names=None if names is None else tuple(map(_one_line, names)),
        skipped=tuple(SkippedImage(*map(_one_line, bad)) for bad in skipped),
        labels=arrays.pop("labels", None),
        **arrays,
    )


def _shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    _require(isinstance(shard.name, str) and isinstance(shard.sha256, str), f"a shard is {entry!r}")
    check_name(shard.name, "the index")
    _require(len(shard.sha256) == 64 and set(shard.sha256) <= set("0123456789abcdef"), f"{shard.name} has no SHA-256")
    sizes = (_whole(shard.num_bytes), _whole(shard.num_stored))
    _require(min(sizes) >= 0 and max(sizes) < _MAX_BYTES, f"{shard.name} cannot have {max(sizes)} bytes")
    return shard


def _check_arrays(index: ShardIndex) -> None:
    """Raises `ValueError` unless the arrays fit together and every image lies in its shard."""
    starts, num = index.starts, len(index)
    _require(len(starts) == len(index.shards) + 1 and starts[0] == 0 and starts[-1] == num, "its starts do not fit")
    _require(bool((starts[1:] >= starts[:-1]).all()), "its starts fall")
    _require(len(index.sizes) == len(index.name_ends) == num, "its arrays differ in length")
    _require(len(index.names) == (index.name_ends[-1] if num else 0), "its names do not fit")
    for shard, first, last in zip(index.shards, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for begin in range(first, last, _CHUNK):
            part = slice(begin, min(last, begin + _CHUNK))
            offsets, sizes = index.offsets[part], index.sizes[part]
            fits = (sizes >= 1) & (sizes <= shard.num_stored) & (offsets >= 0) & (offsets <= shard.num_stored - sizes)
            _require(bool(fits.all()), f"an image does not lie in {shard.name}")
    _each_chunk(index.name_ends, _rises, "its names do not rise")
    highest = len(index.class_names) if index.class_names is not None else _MAX_BYTES
    if index.labels is not None:
        _require(len(index.labels) == num, "its labels do not fit")
        _each_chunk(index.labels, lambda part, _: bool(((part >= 0) & (part < highest)).all()), "a label is no class")


def _each_chunk(array: np.ndarray, holds: Callable[[np.ndarray, int], bool], otherwise: str) -> None:
    before = 0
    for start in range(0, len(array), _CHUNK):
        part = array[start : start + _CHUNK]
        _require(holds(part, before), otherwise)
        before = int(part[-1])


def _rises(part: np.ndarray, before: int) -> bool:
    return bool(part[0] >= before and (part[1:] >= part[:-1]).all())


def _one_line(text: str) -> str:
    """The text, which was printable when it was written."""
    return text if text.isprintable() else printable(text)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
