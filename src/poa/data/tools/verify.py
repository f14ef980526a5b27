"""Whether local shards are what their index says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from poa.config import DataConfig
from poa.data.shards import INDEX_NAME, ShardIndex, build_index, locate, open_index
from poa.files import file_sha256


class ShardFault(NamedTuple):
    """A shard that is not as its index says: its name and how it differs."""

    name: str
    reason: str


@dataclass(frozen=True)
class ShardFindings:
    """What a look at shards found.

    Attributes:
        num_shards: those looked at.
        faults: what is wrong with them.
    """

    num_shards: int
    faults: tuple[ShardFault, ...]


def verify_shards(
    spec: str, config: DataConfig, on_progress: Callable[[int, int], None] | None = None
) -> ShardFindings | None:
    """Compares size and SHA-256 of every shard with the index, then where images lie and their labels.

    Args:
        spec: local shards, as for `ShardSource`. Of remote ones each is verified when it is fetched.
        config: `index`, and the columns of Parquet.
        on_progress: called with the shards done and all of them.

    Returns:
        What is wrong; None where the shards, or their index, are remote.

    Raises:
        DataError: there is no such index, or it has not all of the shards.
    """
    location = locate(spec)
    where = locate(config.index or location.of(INDEX_NAME))
    if not (location.is_local and where.is_local):
        return None
    index = open_index(Path(where.base))
    names = location.names or tuple(shard.name for shard in index.shards)
    shards = [shard for shard in index.shards if shard.name in set(names)]
    faults = list[ShardFault]()
    for done, shard in enumerate(shards, 1):
        reason = _difference(Path(location.of(shard.name)), shard.num_bytes, shard.sha256)
        faults += [ShardFault(shard.name, reason)] if reason else []
        if on_progress is not None:
            on_progress(done, len(shards))
    if not faults:
        config = replace(config, image_column=index.column or config.image_column)
        faults += _misplaced(index, build_index(spec, config, None if on_progress is None else _told(on_progress)))
    return ShardFindings(len(shards), tuple(faults))


def _told(on_progress: Callable[[int, int], None]) -> Callable[[str, int, int], None]:
    return lambda _, done, total: on_progress(done, total)


def _difference(file: Path, num_bytes: int, sha256: str) -> str:
    """How a file differs from what it must hold, or nothing."""
    try:
        found = file.stat().st_size
        if found != num_bytes:
            return f"has {found} bytes, and {num_bytes} according to the index"
        return "" if file_sha256(file) == sha256 else "has another SHA-256 than in the index: it is damaged or changed"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _misplaced(index: ShardIndex, anew: ShardIndex) -> Iterator[ShardFault]:
    """The shards whose images lie elsewhere, or have other labels, in an index made anew."""
    number = {shard.name: place for place, shard in enumerate(index.shards)}
    for place, shard in enumerate(anew.shards):
        there = number[shard.name]
        old, new = (slice(*of.starts[at : at + 2].tolist()) for of, at in ((index, there), (anew, place)))
        if any(
            not np.array_equal(getattr(index, name)[old], getattr(anew, name)[new]) for name in ("offsets", "sizes")
        ):
            yield ShardFault(shard.name, "has its images in other places than the index says")
        elif not _same_labels(index, old, anew, new):
            hint = " (is --label-column the one of the index?)" if index.kind == "parquet" else ""
            yield ShardFault(shard.name, f"has other labels than the index says{hint}")


def _same_labels(index: ShardIndex, old: slice, anew: ShardIndex, new: slice) -> bool:
    if index.labels is None or anew.labels is None:
        # A part of the shards may hold one class only, which then is none.
        return index.labels is anew.labels or len(anew.shards) < len(index.shards)
    named = index.class_names is not None and anew.class_names is not None
    return np.array_equal(_classes(index, old, named), _classes(anew, new, named))


def _classes(index: ShardIndex, part: slice, named: bool) -> Shaped[np.ndarray, " images"]:
    """The class of some images, by name or by number."""
    labels = np.asarray(index.labels)[part]
    return np.array(index.class_names)[labels] if named else labels
