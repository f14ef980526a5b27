"""Looks at every image of a source: whether it decodes, how large it is, whether it is there twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped, UInt32

from poa.config import DataConfig
from poa.config.checks import require, require_non_negative, require_probability
from poa.data.base import ImageSource, SkippedImage
from poa.data.tools.ahead import Ahead
from poa.data.tools.look import Look, LookAt
from poa.data.tools.verify import ShardFindings
from poa.data.workers import map_images

SCHEMA_VERSION = 1
"""Of `Findings.as_json`; a number more when a key goes or changes its meaning."""

_SEEN = np.dtype([("digest", "u8", 2), ("width", "u4"), ("height", "u4"), ("format", "u1"), ("mode", "u1")])
"""What is kept of an image, 26 bytes. The digest's first 16 bytes: among 10⁹ images that differ, two have them in
common with a probability of 10⁻²¹. An image that cannot be read has the width 0."""

_CHUNK_SIZE = 64


@dataclass(frozen=True)
class CheckOptions:
    """What counts as wrong."""

    max_bad_share: float = 0.0
    """The greatest share of images that may be unreadable."""
    max_duplicate_share: float = 0.0
    """The greatest share of images that may have the same pixels as another one before them."""
    min_side: int = 0
    """Images whose shorter side has fewer pixels than this are wrong."""
    num_listed: int = 100
    """Images of each fault, and groups of duplicates, that are listed by name; all are counted."""

    def __post_init__(self) -> None:
        require_probability("max_bad_share", self.max_bad_share)
        require_probability("max_duplicate_share", self.max_duplicate_share)
        require_non_negative("min_side", self.min_side)
        require(self.num_listed >= 1, "num_listed", self.num_listed, "1 or more")


@dataclass(frozen=True)
class Duplicates:
    """Images with the same pixels.

    Attributes:
        num_groups: sets of two or more images that are the same.
        num_surplus: images that would have to go to leave one of each.
        num_contradictions: groups whose images have different labels.
        groups: the names of the images of some groups, in order of the source.
    """

    num_groups: int
    num_surplus: int
    num_contradictions: int
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Findings:
    """What a look at every image found.

    Attributes:
        num_images: all images, those found unusable while listing included.
        num_unreadable: those that cannot be read.
        unreadable: some of them with reasons.
        duplicates: images that are there more than once.
        num_small: images whose shorter side is below `options.min_side`.
        small: the names of some of them.
        widths: of the readable images, upright.
        heights: of the readable images, upright.
        formats: how many readable images have each format.
        modes: how many have each of Pillow's modes.
        class_sizes: images of every class, unreadable ones included (without names, of classes that have images); None
            without labels.
        options: what counts as wrong.
        shards: of local shards with an index, whether they are as it says.
    """

    num_images: int
    num_unreadable: int
    unreadable: tuple[SkippedImage, ...]
    duplicates: Duplicates
    num_small: int
    small: tuple[str, ...]
    widths: UInt32[np.ndarray, " readable"] = field(repr=False)
    heights: UInt32[np.ndarray, " readable"] = field(repr=False)
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    class_sizes: Int64[np.ndarray, " classes"] | None
    options: CheckOptions
    shards: ShardFindings | None = None

    @property
    def short_sides(self) -> UInt32[np.ndarray, " readable"]:
        """The shorter side of every readable image."""
        return np.asarray(np.minimum(self.widths, self.heights))

    @property
    def aspect_ratios(self) -> Float[np.ndarray, " readable"]:
        """Width over height of every readable image."""
        return np.asarray(self.widths / self.heights)

    def problems(self) -> list[str]:
        """What is wrong, each a sentence on how to mend it behind it; empty if all is well."""
        found, options, total = list[str](), self.options, self.num_images
        if self.shards is not None and self.shards.faults:
            found.append(
                f"shards that are not as their index says: {len(self.shards.faults):,} of {self.shards.num_shards:,}. "
                f"Copy them again; if they were changed on purpose, make the index anew: poa data index"
            )
        if self.num_unreadable > options.max_bad_share * total:
            found.append(
                f"images that cannot be read: {self.num_unreadable:,} of {total:,}. Mend or remove them, convert the "
                f"rest by `poa data shard`, which leaves them out, or accept them by --max-bad-share."
            )
        if self.duplicates.num_surplus > options.max_duplicate_share * total:
            labels = f"; groups with different labels: {self.duplicates.num_contradictions:,}"
            found.append(
                f"images with the pixels of another one: {self.duplicates.num_surplus:,} of {total:,}"
                f"{labels if self.duplicates.num_contradictions else ''}. Remove all but one of each group, or accept "
                f"them by --max-duplicate-share."
            )
        if self.num_small:
            found.append(
                f"images with a side of fewer than {options.min_side} pixels: {self.num_small:,} of {total:,}. Remove "
                f"them, or choose a recipe for smaller images."
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it with keys that stay (`schema_version`)."""
        classes = self.class_sizes
        return {
            "schema_version": SCHEMA_VERSION,
            "problems": self.problems(),
            "num_images": self.num_images,
            "unreadable": {"count": self.num_unreadable, "images": [bad._asdict() for bad in self.unreadable]},
            "duplicates": {
                "groups": self.duplicates.num_groups,
                "surplus": self.duplicates.num_surplus,
                "contradictions": self.duplicates.num_contradictions,
                "images": [list(group) for group in self.duplicates.groups],
            },
            "small": {"min_side": self.options.min_side, "count": self.num_small, "images": list(self.small)},
            "width": spread(self.widths),
            "height": spread(self.heights),
            "short_side": spread(self.short_sides),
            "aspect_ratio": spread(self.aspect_ratios),
            "formats": dict(self.formats),
            "modes": dict(self.modes),
            "shards": self._shards_as_json(),
            "classes": None if classes is None else {"count": len(classes), "images": spread(classes)},
        }

    def _shards_as_json(self) -> dict[str, Any] | None:
        if self.shards is None:
            return None
        return {"count": self.shards.num_shards, "faults": [fault._asdict() for fault in self.shards.faults]}


def spread(values: Shaped[np.ndarray, " N"]) -> dict[str, float] | None:
    """The least, the middle and the greatest value; None of no values."""
    if not len(values):
        return None
    return {name: getattr(np, name)(values).item() for name in ("min", "median", "max")}


def check_images(
    source: ImageSource,
    options: CheckOptions = CheckOptions(),
    *,
    config: DataConfig,
    num_workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Decodes every image and says what there is; the same for any number of workers.

    Memory beside the source: some 80 bytes for each image, and the names that are listed.

    Args:
        source: the images.
        options: what counts as wrong.
        config: its limits on pixels and bytes; an image beyond them counts as unreadable.
        num_workers: processes that decode; 0 decodes in this one.
        on_progress: called with the images done and all of them.

    Raises:
        DataError: a process that decodes was ended from outside, or the source as a whole cannot be read.
    """
    seen = np.zeros(len(source), _SEEN)
    formats, modes = list[str](), list[str]()
    bad = list(source.skipped[: options.num_listed])
    looks = map_images(LookAt(source, config), np.arange(len(source)), num_workers, _CHUNK_SIZE)
    with Ahead(source) as ahead:
        for index, look in enumerate(looks):
            if isinstance(look, Look):
                digest = np.frombuffer(look.digest[:16], "<u8")
                numbers = (_number(look.format, formats), _number(look.mode, modes))
                seen[index] = (digest, look.width, look.height, *numbers)
            elif len(bad) < options.num_listed:
                bad.append(SkippedImage(source.image_name(index), look))
            ahead.reached(index)
            if on_progress is not None and ((index + 1) % _CHUNK_SIZE == 0 or index + 1 == len(source)):
                on_progress(index + 1, len(source))
    return _found(source, seen, (formats, modes), tuple(bad), options)


def _number(word: str, words: list[str]) -> int:
    """The place of a word in a list; it is added where it is not there."""
    if word not in words:
        words.append(word)
    return words.index(word)


def _found(
    source: ImageSource,
    seen: Shaped[np.ndarray, " images"],
    words: tuple[Sequence[str], Sequence[str]],
    bad: tuple[SkippedImage, ...],
    options: CheckOptions,
) -> Findings:
    readable = seen["width"] > 0
    widths, heights = (seen[name][readable] for name in ("width", "height"))
    small = np.flatnonzero(readable & (np.minimum(seen["width"], seen["height"]) < options.min_side))
    formats, modes = (
        _counted(seen[name][readable], known) for name, known in zip(("format", "mode"), words, strict=True)
    )
    return Findings(
        num_images=len(source) + len(source.skipped),
        num_unreadable=len(source.skipped) + int((~readable).sum()),
        unreadable=bad,
        duplicates=_duplicates(source, seen["digest"], readable, options.num_listed),
        num_small=len(small),
        small=tuple(source.image_name(index) for index in small[: options.num_listed].tolist()),
        widths=widths,
        heights=heights,
        formats=formats,
        modes=modes,
        class_sizes=_class_sizes(source),
        options=options,
    )


def _class_sizes(source: ImageSource) -> Int64[np.ndarray, " classes"] | None:
    """Images of every class; without names of classes, of those that have images."""
    if source.labels is None:
        return None
    if source.class_names is not None:
        return np.bincount(source.labels, minlength=len(source.class_names)).astype(np.int64)
    return np.unique(source.labels, return_counts=True)[1].astype(np.int64)


def _counted(numbers: Shaped[np.ndarray, " N"], words: Sequence[str]) -> dict[str, int]:
    """How often each word comes, the most frequent first."""
    counts = np.bincount(numbers, minlength=len(words)).tolist()
    return dict(sorted(zip(words, counts, strict=True), key=lambda item: (-item[1], item[0])))


def _duplicates(
    source: ImageSource, digests: Shaped[np.ndarray, "images 2"], readable: Bool[np.ndarray, " images"], num_listed: int
) -> Duplicates:
    indices = np.flatnonzero(readable)
    # Sorting is stable: within a group the images stay in order.
    indices = indices[np.lexsort(digests[indices].T)]
    is_first = np.ones(len(indices), dtype=bool)
    is_first[1:] = (digests[indices[1:]] != digests[indices[:-1]]).any(axis=1)
    starts = np.flatnonzero(is_first)
    sizes = np.diff(np.append(starts, len(indices)))
    groups = np.flatnonzero(sizes > 1)
    contradictions = 0
    if source.labels is not None and len(groups):
        labels = np.asarray(source.labels)[indices]
        differs = np.maximum.reduceat(labels, starts) != np.minimum.reduceat(labels, starts)
        contradictions = int(differs.sum())
    groups = groups[np.argsort(indices[starts[groups]], kind="stable")][:num_listed]
    members = [
        indices[start : start + min(size, num_listed)]
        for start, size in zip(starts[groups], sizes[groups], strict=True)
    ]
    return Duplicates(
        num_groups=int((sizes > 1).sum()),
        num_surplus=len(indices) - len(starts),
        num_contradictions=contradictions,
        groups=tuple(tuple(map(source.image_name, group.tolist())) for group in members),
    )
