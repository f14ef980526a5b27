"""COCO annotation files, checked entry by entry before anything is trained."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from poa.data import BadImage, SkippedImage, decode_image
from poa.data.base import printable
from poa.data.sources import check_bad_share
from poa.errors import DataError
from poa.files import json_value
from poa.tasks.dense.entries import BadEntry, as_object, entry_area, entry_box, entry_field, run_lengths


class Accepting(NamedTuple):
    """What of an annotation file is needed and accepted."""

    masks: bool
    """Whether every object needs a mask."""
    max_bad_share: float
    """The share of the images, and of the annotations, that may be unusable."""
    max_pixels: int
    """Larger images are unusable."""
    option: str
    """The option that sets `max_bad_share`, for messages."""


class Instance(NamedTuple):
    """An object on an image."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the image, within it."""
    label: int
    """Class, counted from 0."""
    is_crowd: bool
    """Whether it is a group whose members are not told apart."""
    area: float
    """In pixels; COCO's metric sorts objects into small, medium and large by it."""
    mask: dict[str, Any] | None
    """Run lengths over the image, compressed as COCO does; None where masks are not asked for."""


@dataclass
class AnnotatedImage:
    """An image file with its objects."""

    file_name: str
    size: tuple[int, int] | None
    """Height and width."""
    instances: list[Instance] = field(default_factory=list)


@dataclass(frozen=True)
class AnnotationCounts:
    """What an annotation file holds and what of it cannot be used.

    Attributes:
        num_images: that are used.
        num_boxes: of objects on them, crowds not counted.
        num_crowds: groups: not trained on, and no false positives where they are detected.
        num_negatives: images without an object, used as such.
        num_clipped: boxes that reached out of their image and were cut at its border.
        num_lost: annotations of images that cannot be used.
        skipped_images: with reasons.
        skipped_annotations: with reasons; named by image and id.
    """

    num_images: int
    num_boxes: int
    num_crowds: int
    num_negatives: int
    num_clipped: int
    num_lost: int
    skipped_images: tuple[SkippedImage, ...]
    skipped_annotations: tuple[SkippedImage, ...]

    @property
    def skipped(self) -> tuple[SkippedImage, ...]:
        """All that is left out."""
        return self.skipped_images + self.skipped_annotations


class Annotations(NamedTuple):
    """The usable part of an annotation file."""

    images: list[AnnotatedImage]
    class_names: tuple[str, ...]
    """In the order of the categories' ids."""
    counts: AnnotationCounts


def read_annotations(file: Path, folder: Path, accepting: Accepting, num_channels: int) -> Annotations:
    """Reads a COCO file, decodes every image once, and leaves out what cannot be used.

    Boxes are cut at the border of their image; those of which nothing remains, that have no area or a side that is no
    finite number are left out, as are annotations of unknown images or categories or of an id that is taken, and
    images that cannot be decoded or are not of the size that the file says.

    Args:
        file: the annotations.
        folder: what the images' `file_name`s are relative to.
        accepting: what is needed and accepted.
        num_channels: of the decoded images.

    Raises:
        DataError: the file is no COCO annotation file, holds no object, too much of it cannot be used, or masks are
            asked for and the library that reads them is not installed.
    """
    document = _document(file)
    _require_folder(document["images"], folder, file)
    categories = _categories(document, file)
    reader = _Reader(folder, accepting, num_channels, {key: label for label, key in enumerate(sorted(categories))})
    reader.read_images(document["images"])
    reader.read_objects(document["annotations"])
    counts = reader.counts()
    for what, bad in (("images", counts.skipped_images), ("annotations", counts.skipped_annotations)):
        share, option = accepting.max_bad_share, accepting.option
        check_bad_share(bad, len(document[what]), share, what=f"{what} of {file}", option=option)
    if not counts.num_boxes:
        raise DataError(
            f"{file} holds no object to detect: {counts.num_images} usable images, {counts.num_crowds} crowds, "
            f"{len(document['annotations'])} entries under `annotations`."
        )
    names = tuple(categories[key] for key in sorted(categories))
    return Annotations(list(reader.images.values()), names, counts)


class _Reader:
    """Collects the usable images and objects, and the unusable ones with reasons."""

    def __init__(self, folder: Path, accepting: Accepting, num_channels: int, labels: dict[int, int]) -> None:
        self.folder, self.accepting, self.num_channels, self.labels = folder, accepting, num_channels, labels
        self.images: dict[int, AnnotatedImage] = {}
        self.unusable: set[int] = set()
        self.known_ids: set[int | str] = set()
        self.skipped_images: list[SkippedImage] = []
        self.skipped_annotations: list[SkippedImage] = []
        self.num_clipped = self.num_lost = 0

    def read_images(self, entries: list[Any]) -> None:
        """Keeps the images that can be decoded and are of the stated size."""
        for number, entry in enumerate(entries):
            try:
                self._read_image(as_object(entry))
            except BadEntry as error:
                self.skipped_images.append(SkippedImage(_image_name(entry, number), str(error)))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            problems = list(threads.map(self._problem, self.images.values()))
        for (key, image), problem in zip(list(self.images.items()), problems, strict=True):
            if problem:
                self.unusable.add(key)
                self.skipped_images.append(SkippedImage(printable(image.file_name), problem))
                del self.images[key]

    def _read_image(self, entry: dict[str, Any]) -> None:
        key = entry_field(entry, "id")
        if not isinstance(key, int):
            raise BadEntry(f"its id is {key!r}, no whole number")
        if key in self.images:
            raise BadEntry(f"its id {key} is also that of {printable(self.images[key].file_name)}")
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            self.unusable.add(key)
            raise BadEntry(f"its file_name is {name!r}")
        height, width = entry.get("height"), entry.get("width")
        if not all(side is None or isinstance(side, int) for side in (height, width)):
            self.unusable.add(key)
            raise BadEntry(f"its height and width are {str((height, width))[:80]}, no whole numbers")
        self.images[key] = AnnotatedImage(name, None if height is None or width is None else (height, width))

    def _problem(self, image: AnnotatedImage) -> str:
        """Why the image cannot be used, if so; where the file does not state its size, it is filled in."""
        try:
            decoded = decode_image(self.folder / image.file_name, self.num_channels, self.accepting.max_pixels)
        except BadImage as error:
            return error.reason
        size = (decoded.height, decoded.width)
        if image.size is not None and image.size != size:
            return (
                f"is {size[1]}×{size[0]} pixels (upright, after its EXIF orientation), the annotations say "
                f"{image.size[1]}×{image.size[0]}"
            )
        image.size = size
        return ""

    def read_objects(self, entries: list[Any]) -> None:
        """Gives the images their objects."""
        for number, entry in enumerate(entries):
            try:
                self._read_object(as_object(entry))
            except BadEntry as error:
                self.skipped_annotations.append(SkippedImage(self._object_name(entry, number), str(error)))

    def _read_object(self, entry: dict[str, Any]) -> None:
        key, category = entry_field(entry, "image_id"), entry_field(entry, "category_id")
        own = entry_field(entry, "id") if "id" in entry else None
        if own in self.known_ids:
            raise BadEntry("another annotation has its id")
        if own is not None:
            self.known_ids.add(own)
        if key in self.unusable:
            self.num_lost += 1
            return
        if key not in self.images:
            raise BadEntry(f"there is no image of id {key!r}")
        if category not in self.labels:
            raise BadEntry(f"there is no category of id {category!r}")
        image = self.images[key]
        height, width = image.size or (0, 0)
        stated = entry_box(entry_field(entry, "bbox"))
        box = (max(0.0, stated[0]), max(0.0, stated[1]), min(float(width), stated[2]), min(float(height), stated[3]))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise BadEntry(f"its box {entry['bbox']} lies outside of its image of {width}×{height}")
        mask = run_lengths(entry.get("segmentation"), (height, width)) if self.accepting.masks else None
        self.num_clipped += box != stated
        image.instances.append(
            Instance(box, self.labels[category], bool(entry.get("iscrowd", 0)), entry_area(entry, box), mask)
        )

    def _object_name(self, entry: object, number: int) -> str:
        if not isinstance(entry, dict):
            return f"annotation {number}"
        key = entry.get("image_id")
        image = self.images.get(key) if isinstance(key, int) else None
        where = f" on {printable(image.file_name)}" if image else ""
        return printable(f"annotation {entry.get('id', number)}") + where

    def counts(self) -> AnnotationCounts:
        """Of what was read."""
        objects = [sum(not item.is_crowd for item in image.instances) for image in self.images.values()]
        return AnnotationCounts(
            num_images=len(self.images),
            num_boxes=sum(objects),
            num_crowds=sum(len(image.instances) for image in self.images.values()) - sum(objects),
            num_negatives=objects.count(0),
            num_clipped=self.num_clipped,
            num_lost=self.num_lost,
            skipped_images=tuple(self.skipped_images),
            skipped_annotations=tuple(self.skipped_annotations),
        )


def _document(file: Path) -> dict[str, Any]:
    wanted = "a COCO annotation file: a JSON object with the lists `images`, `annotations` and `categories`"
    try:
        document = json_value(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Give {wanted}.") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON file: {error}. Give {wanted}.") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(part), list) for part in parts):
        found = f"the keys {', '.join(sorted(document))}" if isinstance(document, dict) else type(document).__name__
        raise DataError(f"{file} must be {wanted}; got {printable(found)}.")
    return document


def _categories(document: dict[str, Any], file: Path) -> dict[int, str]:
    """The categories' names by id; those that share a name have their id added."""
    try:
        pairs = [(int(entry["id"]), printable(str(entry["name"]))) for entry in document["categories"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"every entry of `categories` of {file} needs a whole number `id` and a `name`.") from error
    ids = Counter(key for key, _ in pairs)
    if not pairs or max(ids.values()) > 1:
        what = f"the id {ids.most_common(1)[0][0]} more than once" if pairs else "nothing"
        raise DataError(f"`categories` of {file} must name every class once; it holds {what}.")
    names = Counter(name for _, name in pairs)
    return {key: name if names[name] == 1 else f"{name} ({key})" for key, name in pairs}


def _require_folder(entries: list[Any], folder: Path, file: Path) -> None:
    """Refuses a folder that has none of the images."""
    names = [entry.get("file_name") for entry in entries if isinstance(entry, dict)]
    files = [name for name in names if isinstance(name, str) and name]
    if files and not any((folder / name).is_file() for name in files):
        raise DataError(
            f"none of the {len(files)} images of {file} is in {folder}; the first is {printable(files[0])!r}. Name the "
            "folder that their file names are relative to."
        )


def _image_name(entry: object, number: int) -> str:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    return printable(name) if isinstance(name, str) and name else f"image {number}"
