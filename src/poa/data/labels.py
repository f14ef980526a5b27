"""Images with what is to be predicted of them: one class each, or any number of classes."""

from __future__ import annotations

import csv
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from poa.config import DataConfig
from poa.data.base import ImageSource, printable
from poa.data.folder import FolderSource
from poa.data.parquet import ParquetSource
from poa.data.sources import open_source
from poa.data.split import stratified_split
from poa.errors import DataError

LABELS_FILE = "labels.csv"
"""In a folder of images with several labels: columns `image` (path in the folder) and `labels` (classes, by `;`)."""


@dataclass(frozen=True)
class LabelledImages:
    """Some images of a source with their classes.

    Attributes:
        source: the images.
        indices: which of them.
        targets: the class of each, or for each class whether the image is of it.
        class_names: by class.
    """

    source: ImageSource
    indices: Int64[np.ndarray, " N"]
    targets: Int64[np.ndarray, " N"] | Bool[np.ndarray, "N K"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.targets.ndim == 2

    @property
    def counts(self) -> Int64[np.ndarray, " K"]:
        """Images of each class."""
        if self.is_multi_label:
            return np.asarray(self.targets.sum(axis=0), dtype=np.int64)
        return np.bincount(self.targets, minlength=len(self.class_names)).astype(np.int64)

    @property
    def num_without_label(self) -> int:
        """Images of no class."""
        return int((~self.targets.any(axis=1)).sum()) if self.is_multi_label else 0

    @property
    def fingerprint(self) -> str:
        """Changes when images, classes or their names do."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(self.indices.tobytes() + self.targets.tobytes() + "\n".join(self.class_names).encode())
        return digest.hexdigest()

    def at(self, positions: Int64[np.ndarray, " M"]) -> LabelledImages:
        """Those at some positions."""
        return replace(self, indices=self.indices[positions], targets=self.targets[positions])


def open_labelled(spec: str, config: DataConfig, num_channels: int, *, multi_label: bool = False) -> LabelledImages:
    """The images that a spec names, all labelled.

    With one class each: as `open_source` says. With several: a folder with `labels.csv` (see `LABELS_FILE`; every image
    has a row, which may name no class), or Parquet whose `config.label_column` has lists of classes, whole numbers or
    names; they may be empty.

    Args:
        spec: as for `open_source`.
        config: columns, limits.
        num_channels: as for `open_source`.
        multi_label: whether an image may have any number of classes.

    Raises:
        DataError: labels are missing, not understood, or name one class only; or as `open_source`.
    """
    if multi_label:
        source = open_source(spec, replace(config, label_column=""), num_channels)
        found = _several(source, config.label_column)
    else:
        source = open_source(spec, config, num_channels, require_labels=True)
        labels = np.asarray(source.labels)
        names = source.class_names or tuple(map(str, range(int(labels.max()) + 1)))
        found = LabelledImages(source, np.arange(len(source)), labels, names)
    if int((found.counts > 0).sum()) < 2:
        raise DataError(f"all labelled images of {spec!r} are of one class; two or more are needed.")
    return found


def with_classes_of(images: LabelledImages, train: LabelledImages) -> LabelledImages:
    """The same images with the classes numbered as in `train`, by their names.

    Raises:
        DataError: an image is of a class that no image of `train` is of.
    """
    known = {name: label for label, name in enumerate(train.class_names) if train.counts[label]}
    present = [name for name, count in zip(images.class_names, images.counts, strict=True) if count]
    unknown = [name for name in present if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(
            f"{images.source.spec!r} has images of {len(unknown)} classes that no training image is of: "
            f"{', '.join(map(repr, unknown[:5]))}{hint}. Add training images of them, or leave them out."
        )
    number = np.array([known.get(name, -1) for name in images.class_names], dtype=np.int64)
    if images.is_multi_label:
        targets = np.zeros((len(images), len(train.class_names)), dtype=bool)
        seen = number >= 0
        targets[:, number[seen]] = images.targets[:, seen]
        return replace(images, targets=targets, class_names=train.class_names)
    return replace(images, targets=number[images.targets], class_names=train.class_names)


def hold_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The images that stay, and `share` of every class held out.

    Images of several classes count to the rarest of theirs; of no class are all images held out.

    Raises:
        DataError: a class has one image only (where each image is of one class).
    """
    groups, least = images.targets, 2
    if images.is_multi_label:
        by_rarity = np.argsort(images.counts, kind="stable")
        rarest = by_rarity[images.targets[:, by_rarity].argmax(axis=1)]
        groups, least = np.where(images.targets.any(axis=1), rarest, -1).astype(np.int64), 1
    kept, held = stratified_split(groups, share, seed, least=least)
    if images.is_multi_label:
        back = [held[images.targets[held, label].argmax()] for label in np.flatnonzero(images.at(kept).counts == 0)]
        back = [position for position in back if images.targets[position].any()]
        kept, held = np.union1d(kept, back).astype(np.int64), np.setdiff1d(held, back)
    return images.at(kept), images.at(held)


def _several(source: ImageSource, column: str) -> LabelledImages:
    names: tuple[str, ...] | None = None
    if isinstance(source, FolderSource):
        lists: list[Any] = _read_table(source)
    elif isinstance(source, ParquetSource):
        lists, names = source.column(column)
    else:
        raise DataError(f"{source.spec!r} has one label for each image, not several.")
    kinds = {type(item) for items in lists if isinstance(items, list) for item in items}
    faulty = [index for index, items in enumerate(lists) if not isinstance(items, list)]
    if faulty or not (kinds <= {int} or kinds <= {str}):
        what = f"{source.image_name(faulty[0])} has {lists[faulty[0]]!r}" if faulty else "names and numbers are mixed"
        raise DataError(
            f"{source.spec!r}: several labels are lists of whole numbers, or of names, in every row (they may be "
            f"empty); {what}. Name the column by --label-column."
        )
    if kinds == {int}:
        names, lists = _named(source, names, lists)
    else:
        names = tuple(sorted({item for items in lists for item in items}))
    number = {name: label for label, name in enumerate(names or ())}
    targets = np.zeros((len(lists), len(number)), dtype=bool)
    for row, items in enumerate(lists):
        targets[row, [number[item] for item in items]] = True
    return LabelledImages(source, np.arange(len(source)), targets, tuple(map(printable, number)))


def _named(
    source: ImageSource, names: tuple[str, ...] | None, lists: Sequence[list[int]]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The classes' names and the lists with names for numbers."""
    numbers = {item for items in lists for item in items}
    names = names or tuple(map(str, range(max(numbers) + 1)))
    wrong = sorted(item for item in numbers if not 0 <= item < len(names))
    if wrong:
        raise DataError(f"{source.spec!r} has the class {wrong[0]}; classes are 0 to {len(names) - 1}.")
    return names, [[names[item] for item in items] for items in lists]


def _read_table(source: FolderSource) -> list[list[str]]:
    """For every image of the folder the classes that its `labels.csv` names."""
    file = source.root / LABELS_FILE
    rows = _rows(file)
    found: dict[str, list[str]] = {}
    for row in rows:
        name = printable(row["image"].strip())
        if name in found:
            raise DataError(f"{file} has more than one row for {name!r}.")
        found[name] = [part.strip() for part in row["labels"].split(";") if part.strip()]
    images = [source.image_name(index) for index in range(len(source))]
    missing = [name for name in images if name not in found]
    if missing:
        raise DataError(
            f"{file} has no row for {len(missing)} images, {', '.join(map(repr, missing[:3]))} for example. An image "
            "of no class has a row with empty labels."
        )
    surplus = sorted(found.keys() - set(images) - {bad.name for bad in source.skipped})
    if surplus:
        raise DataError(f"{file} has rows for {len(surplus)} images that are not there: {', '.join(surplus[:3])}.")
    return [found[name] for name in images]


def _rows(file: Path) -> list[dict[str, str]]:
    how = "several labels need a table with the columns image,labels (a path in the folder; classes with ; between)"
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = list(reader)
            columns = reader.fieldnames or []
    except FileNotFoundError as error:
        raise DataError(f"there is no {file}: {how}.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    if not {"image", "labels"} <= set(columns) or any(row["image"] is None or row["labels"] is None for row in rows):
        raise DataError(f"{file}: {how}; got the columns {', '.join(columns) or 'none'}, or a row is cut short.")
    return rows
