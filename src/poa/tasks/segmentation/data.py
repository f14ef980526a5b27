"""Images with a class for every pixel: folders of images and masks, and COCO files. Checked whole when opened."""

from __future__ import annotations

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from poa.config import DataConfig
from poa.config.segment import SegmentConfig
from poa.data import BadImage, SkippedImage, decode_image, open_source
from poa.data.base import printable
from poa.data.sources import check_bad_share
from poa.errors import DataError, PoaWarning
from poa.files import json_value
from poa.tasks.dense.annotations import Accepting, Instance, read_annotations
from poa.tasks.dense.extras import mask_api

IGNORED = 255
"""The class of pixels that are neither trained on nor measured."""
CLASSES_FILE = "classes.json"
MAX_CLASSES = 255
_MASK_MODES = ("1", "L", "P")
_SHARE_OPTION = "--segment.max-bad-share"
_LAYOUT = (
    "Give a folder with images/ and masks/ (8-bit PNG of the same name, a class id for every pixel), or a COCO file "
    "ending in .json."
)

OnProgress = Callable[[str, int, int], None]
"""Called with what is checked, images done, and all images."""


class PixelClasses(NamedTuple):
    """The classes, and which id of a mask file is which."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    """For each class its id in the masks."""
    ignored_id: int = IGNORED
    """The id of pixels that are left out."""

    @property
    def table(self) -> Int64[np.ndarray, "256"]:
        """For each id its class, `IGNORED`, or −1 where it has no meaning."""
        found = np.full(256, -1, dtype=np.int64)
        found[list(self.ids)] = np.arange(len(self.ids))
        if 0 <= self.ignored_id < len(found):
            found[self.ignored_id] = IGNORED
        return found

    @property
    def described(self) -> str:
        """For messages."""
        return f"ids of classes are {min(self.ids)} to {max(self.ids)}, {self.ignored_id} is left out"


class DenseImages(ABC):
    """Images with masks, all of which could be read when they were opened.

    Attributes:
        name: what the user wrote.
        class_names: by class.
        pixels: of each class, in all masks.
        skipped: images, and objects of COCO files, that cannot be used.
        fingerprint: changes when the images or masks do.
    """

    name: str
    class_names: tuple[str, ...]
    pixels: Int64[np.ndarray, " classes"]
    skipped: tuple[SkippedImage, ...]
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_name(self, index: int) -> str:
        """For messages."""

    @abstractmethod
    def decoded(self, index: int) -> Image.Image:
        """The image.

        Raises:
            BadImage: it cannot be read.
        """

    @abstractmethod
    def mask(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """The class of every pixel, or `IGNORED`.

        Raises:
            BadImage: it cannot be read.
        """

    def load(self, index: int) -> tuple[Image.Image, UInt8[np.ndarray, "h w"]]:
        """The image and its mask.

        Raises:
            DataError: they can no longer be read.
        """
        try:
            return self.decoded(index), self.mask(index)
        except BadImage as error:
            raise DataError(
                f"{self.image_name(index)} {error.reason}; it could be read when the data were checked. "
                "Is the disk still there?"
            ) from error


class FolderImages(DenseImages):
    """`images/*` and `masks/*.png` of a folder, of the same names.

    Args:
        folder: the folder.
        classes: which ids are which classes; None: as many as the largest id says, 255 is left out.
        config: the greatest size of an image and share of unusable ones.
        num_channels: of the images, as the network takes.
        on_progress: told how many images are checked.

    Raises:
        DataError: there are no images or masks, or too many of them cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        classes: PixelClasses | None,
        config: SegmentConfig,
        num_channels: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        for part in ("images", "masks"):
            if not (folder / part).is_dir():
                raise DataError(f"there is no folder {folder / part}. {_LAYOUT}")
        data = DataConfig("", max_bad_share=config.max_bad_share, max_pixels=config.max_pixels)
        self.name, self.folder, self.max_pixels = str(folder), folder, config.max_pixels
        self.source = open_source(str(folder / "images"), data, num_channels)
        self.indices = np.arange(len(self.source))
        found = _checked(len(self.source), partial(self._ids, classes), self.name, on_progress)
        bad = {index: reason for index, reason in enumerate(found) if isinstance(reason, str)}
        self.indices = np.array([index for index in range(len(found)) if index not in bad], dtype=np.int64)
        self.skipped = (
            *self.source.skipped,
            *(SkippedImage(self.source.image_name(index), reason) for index, reason in bad.items()),
        )
        total, share = len(self.source) + len(self.source.skipped), config.max_bad_share
        check_bad_share(self.skipped, total, share, what=f"images of {self.name}", option=_SHARE_OPTION)
        counts = np.array([ids for ids in found if not isinstance(ids, str)]).reshape(-1, 256)
        self.classes = classes or _counted_classes(counts.sum(axis=0))
        self.class_names = self.classes.names
        self.pixels = counts.sum(axis=0)[list(self.classes.ids)]
        self.fingerprint = hashlib.sha256(self.source.fingerprint.encode() + counts.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def image_name(self, index: int) -> str:
        """See `DenseImages.image_name`."""
        return self.source.image_name(int(self.indices[index]))

    def decoded(self, index: int) -> Image.Image:
        """See `DenseImages.decoded`."""
        return self.source.load(int(self.indices[index]))

    def mask(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """See `DenseImages.mask`."""
        found: np.ndarray = self.classes.table[self._file_ids(index)].astype(np.uint8)
        return found

    def _file_ids(self, index: int) -> UInt8[np.ndarray, "h w"]:
        file = (self.folder / "masks" / self.image_name(index)).with_suffix(".png")
        return read_ids(file, self.max_pixels)

    def _ids(self, classes: PixelClasses | None, index: int) -> Int64[np.ndarray, "256"]:
        """How many pixels of each id the mask has."""
        image, ids = self.decoded(index), self._file_ids(index)
        if ids.shape != (image.height, image.width):
            height, width = ids.shape
            raise BadImage(
                f"is {image.width}×{image.height} pixels (upright, after its EXIF orientation), its mask is "
                f"{width}×{height}"
            )
        counts = np.bincount(ids.ravel(), minlength=256)
        if classes is not None:
            unknown = np.flatnonzero(counts * (classes.table < 0)).tolist()
            if unknown:
                raise BadImage(f"its mask has the id {unknown[0]}, which no class has ({classes.described})")
        return counts


class CocoImages(DenseImages):
    """The images of a COCO file; of objects that overlap the smaller one is in front.

    Args:
        file: the annotations, polygons or run lengths. Images of X.json are looked for in the folder X beside it, where
            there is none in `images`, else where X.json is.
        config: what pixels without an object are, and what share may be unusable.
        num_channels: of the images, as the network takes.
        on_progress: told how many images are checked.

    Raises:
        DataError: it is no COCO file, or too much of it cannot be used.
        ConfigError: the library that reads masks is not installed.
    """

    def __init__(
        self, file: Path, config: SegmentConfig, num_channels: int, on_progress: OnProgress | None = None
    ) -> None:
        folders = (file.with_suffix(""), file.parent / "images", file.parent)
        self.name, self.folder = str(file), next(folder for folder in folders if folder.is_dir())
        self.num_channels, self.max_pixels = num_channels, config.max_pixels
        accepting = Accepting(True, config.max_bad_share, config.max_pixels, _SHARE_OPTION)
        found = read_annotations(file, self.folder, accepting, num_channels)
        self.images, counts = found.images, found.counts
        self.skipped = (*counts.skipped_images, *counts.skipped_annotations)
        self.first = int(config.background == "class")
        self.class_names = (*("background",) * self.first, *found.class_names)
        if len(self.class_names) > MAX_CLASSES:
            raise DataError(f"{file} has {len(self.class_names)} classes; masks hold {MAX_CLASSES} at most.")
        sums = _checked(len(found.images), self._counts, self.name, on_progress)
        self.pixels = np.sum([part for part in sums if not isinstance(part, str)], axis=0)[: len(self.class_names)]
        digest = hashlib.sha256(file.read_bytes())
        digest.update(config.background.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def image_name(self, index: int) -> str:
        """See `DenseImages.image_name`."""
        return printable(self.images[index].file_name)

    def decoded(self, index: int) -> Image.Image:
        """See `DenseImages.decoded`."""
        return decode_image(self.folder / self.images[index].file_name, self.num_channels, self.max_pixels)

    def mask(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """See `DenseImages.mask`."""
        image = self.images[index]
        found = np.full(image.size or (0, 0), 0 if self.first else IGNORED, dtype=np.uint8)

        def area(item: Instance) -> float:
            return float(mask_api().area(item.mask))

        for item in sorted(image.instances, key=area, reverse=True):
            found[mask_api().decode(item.mask).astype(bool)] = item.label + self.first
        return found

    def _counts(self, index: int) -> Int64[np.ndarray, "256"]:
        return np.bincount(self.mask(index).ravel(), minlength=256)


class SegmentationData(NamedTuple):
    """What is trained on, what the best epoch is chosen by, and what is measured on, with the same classes."""

    train: DenseImages
    val: DenseImages | None
    test: DenseImages

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class."""
        return self.train.class_names

    @property
    def skipped(self) -> tuple[SkippedImage, ...]:
        """What cannot be used of all of them."""
        return tuple(bad for images in self if images is not None for bad in images.skipped)

    @property
    def fingerprint(self) -> str:
        """Changes when any of them does."""
        return " ".join("" if images is None else images.fingerprint for images in self)


def open_segmentation(
    train: str,
    test: str,
    config: SegmentConfig,
    num_channels: int = 3,
    *,
    val: str | None = None,
    classes: Path | None = None,
    on_progress: OnProgress | None = None,
) -> SegmentationData:
    """Opens and checks the images: every file is decoded once. A class without a training pixel is warned of.

    Args:
        train: a folder with images/ and masks/, or a COCO file ending in .json.
        test: likewise.
        config: what is accepted.
        num_channels: of the images: 1, 3 or 4.
        val: likewise, to choose the best epoch by.
        classes: a JSON file with the classes of mask files (see `read_classes`); by default classes.json in the folder
            of `train` or above it, and where there is none, every id up to the largest is a class and 255 is left out.
        on_progress: told how many images are checked.

    Raises:
        DataError: something is missing, does not fit together, or too much cannot be used.
    """
    specs = {"train": train, "val": val, "test": test}
    is_file = {name: spec.lower().endswith(".json") for name, spec in specs.items() if spec is not None}
    if classes is not None and is_file["train"]:
        raise DataError(f"the classes of {train} are its categories; --classes {classes} is for masks in files.")
    known = None if is_file["train"] else _classes_for(Path(train), classes)
    found: dict[str, DenseImages | None] = {"val": None}
    for name, is_coco in is_file.items():
        path = Path(specs[name] or "").expanduser()
        if not path.exists():
            raise DataError(f"there is no {path}. {_LAYOUT}")
        if is_coco:
            found[name] = CocoImages(path, config, num_channels, on_progress)
        else:
            folder = FolderImages(path, known, config, num_channels, on_progress)
            found[name], known = folder, folder.classes
    opened = SegmentationData(**found)  # type: ignore[arg-type]
    for images in opened:
        _require_usable(images, opened.train)
    return opened


def read_classes(file: Path) -> PixelClasses:
    """The classes that a JSON file names: {"names": [...], "ignore_index": 255}; "classes" is as good as "names".

    A name's place is its id in the masks. Where `ignore_index` is the place of a name, that is no class.

    Raises:
        DataError: it cannot be read, or does not say that.
    """
    wanted = f'{file} must hold {{"names": [1 to {MAX_CLASSES} names], "ignore_index": an id from 0 to 255}}'
    try:
        described: Any = json_value(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{wanted}; it cannot be read: {error}.") from error
    described = described if isinstance(described, dict) else {}
    names, ignored = described.get("names", described.get("classes")), described.get("ignore_index", IGNORED)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{wanted}; got {printable(str(names)[:80])} as names.")
    if not isinstance(ignored, int) or not 0 <= ignored <= IGNORED:
        raise DataError(f"{wanted}; got {ignored!r} as ignore_index.")
    ids = tuple(place for place in range(len(names)) if place != ignored)
    shown = tuple(printable(names[place]) for place in ids)
    if not 1 <= len(ids) <= MAX_CLASSES or len(names) > MAX_CLASSES + 1 or len(set(shown)) < len(shown):
        raise DataError(f"{wanted}, none twice; got {len(names)} names, {len(set(shown))} of them different classes.")
    return PixelClasses(shown, ids, ignored)


def read_ids(file: Path, max_pixels: int) -> UInt8[np.ndarray, "h w"]:
    """The ids of a mask file: the values of an 8-bit grey PNG, the indices of one with a palette.

    Raises:
        BadImage: it is missing, damaged, or holds colours.
    """
    if not file.is_file():
        raise BadImage(f"has no mask ({file.parent.name}/{printable(file.name)})")
    try:
        with Image.open(file, formats=("PNG",)) as mask:
            if mask.width * mask.height > max_pixels:
                raise BadImage(f"its mask has {mask.width}×{mask.height} pixels, more than {max_pixels}")
            if mask.mode not in _MASK_MODES:
                raise BadImage(f"its mask is of mode {mask.mode}; it must hold ids: 8-bit grey, or a palette")
            return np.array(mask).astype(np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f"its mask cannot be read: {' '.join(str(error).split())[:200]}") from error


def _checked(
    num_images: int, check: Callable[[int], Int64[np.ndarray, "256"]], name: str, on_progress: OnProgress | None
) -> list[Int64[np.ndarray, "256"] | str]:
    """For each image what the check gives, or why the image cannot be used."""

    def outcome(index: int) -> Int64[np.ndarray, "256"] | str:
        try:
            return check(index)
        except BadImage as error:
            return error.reason

    found: list[Int64[np.ndarray, "256"] | str] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for item in threads.map(outcome, range(num_images)):
            found.append(item)
            if on_progress is not None:
                on_progress(name, len(found), num_images)
    return found


def _classes_for(folder: Path, file: Path | None) -> PixelClasses | None:
    beside = [folder / CLASSES_FILE, folder.resolve().parent / CLASSES_FILE]
    chosen = file or next((path for path in beside if path.is_file()), None)
    return None if chosen is None else read_classes(chosen)


def _counted_classes(counts: Int64[np.ndarray, "256"]) -> PixelClasses:
    used = np.flatnonzero(counts[:IGNORED])
    ids = tuple(range(int(used.max()) + 1)) if len(used) else ()
    return PixelClasses(tuple(f"class {number}" for number in ids), ids)


def _require_usable(images: DenseImages | None, train: DenseImages) -> None:
    if images is None:
        return
    if images.class_names != train.class_names:
        raise DataError(
            f"{images.name} has the classes {', '.join(images.class_names)}; {train.name}, which is trained on, has "
            f"{', '.join(train.class_names)}. They must be the same, in the same order."
        )
    if not images.pixels.sum():
        raise DataError(f"no pixel of {images.name} is of a class: {len(images)} images with nothing to learn.")
    unseen = [name for name, count in zip(images.class_names, images.pixels, strict=True) if not count]
    if unseen and images is train:
        warnings.warn(
            f"{images.name} has no pixel of {', '.join(unseen)}: these classes cannot be learnt.",
            PoaWarning,
            stacklevel=3,
        )
